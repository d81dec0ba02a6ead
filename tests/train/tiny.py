"""A tiny model, tiny tokens, and a recipe for them: seconds from the first line to a run."""

from __future__ import annotations

import json
from pathlib import Path

from moecc.train.tokens.documents import Format
from moecc.train.tokens.make import Making, make_tokens

GOLDEN = Path(__file__).parent.parent / "golden"
DOCS = Path(__file__).parent.parent.parent / "docs"

RECIPE = """
[model]
source = "model"
pipeline = "upcycle{{experts=2 top-k=2 layers=every:2}}"
start = "random"

[data]
batch = 4
seq = 32
train = [{{ tokens = "tokens/train" }}]
evaluate = [{{ tokens = "tokens/heldout" }}]
evaluate_batches = 1

[optimizer]
rate = 3e-3

[run]
{run}
"""


def make_model(folder: Path, layers: int = 2, **changes: object) -> Path:
    """Write the config of a decoder over bytes; its weights are to be drawn."""
    config = json.loads((GOLDEN / "llama_gqa" / "config.json").read_text())
    config |= {"vocab_size": 384, "num_hidden_layers": layers, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_corpus(out: Path) -> Path:
    """Write token folders ``train`` and ``heldout`` of the documentation, as bytes."""
    texts = (str(DOCS / "tour.md"), str(DOCS / "routing.md"))
    made = Making(
        texts=texts, tokenizer="bytes", format=Format("documents", "text", "paragraph"),
        hold_out=0.2,
    )  # fmt: skip
    make_tokens(made, out)
    return out


def make_recipe(folder: Path, run: str) -> Path:
    """Write model, tokens and a recipe into `folder`, and return the recipe."""
    make_model(folder / "model")
    make_corpus(folder / "tokens")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(run=run))
    return path
