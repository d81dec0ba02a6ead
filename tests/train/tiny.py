"""A tiny model, tiny tokens, and a recipe for them: seconds from the first line to a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.run import METRICS, saved_steps, state_reader
from moecc.model.initialise import initialise
from moecc.model.open import OpenedModel
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.make import Making, make_tokens
from moecc.weights.expr import sources

GOLDEN = Path(__file__).parent.parent / "golden"
DOCS = Path(__file__).parent.parent.parent / "docs"

RECIPE = """
[model]
source = "model"
pipeline = "upcycle{{experts=2 top-k=2 layers=every:2}}"
start = "random"

[data]
batch = 4
seq = {seq}
train = [{{ tokens = "tokens/train" }}]
evaluate = [{{ tokens = "tokens/heldout" }}]
evaluate_batches = 1

[optimizer]
rate = 3e-3

[run]
{run}
"""


def make_model(folder: Path, golden: str = "llama_gqa", **changes: object) -> Path:
    """Write the config of a small model over bytes; its weights are to be drawn."""
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    layers = "num_layers" if "num_layers" in config else "num_hidden_layers"
    config |= {"vocab_size": 384, layers: 2, "max_position_embeddings": 512, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw_weights(folder: Path) -> Path:
    """Write weights for the config in `folder`, drawn at random."""
    graph = build(parse_config(json.loads((folder / "config.json").read_text())))
    names = {n: sources(p.weight)[0].name for n, p in graph.params.items() if p.weight}
    initialise(graph)
    params = OpenedModel(graph, "drawn").params()
    arrays = {names[n]: np.ascontiguousarray(a) for n, a in params.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_corpus(out: Path) -> Path:
    """Write token folders ``train`` and ``heldout`` of the documentation, as bytes."""
    texts = (str(DOCS / "tour.md"), str(DOCS / "routing.md"))
    made = Making(
        texts=texts, tokenizer="bytes", format=DocumentFormat("documents", "text", "paragraph"),
        hold_out=0.2,
    )  # fmt: skip
    make_tokens(made, out)
    return out


def make_recipe(folder: Path, run: str, seq: int = 8) -> Path:
    """Write model, tokens and a recipe into `folder`, and return the recipe."""
    make_model(folder / "model")
    make_corpus(folder / "tokens")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(run=run, seq=seq))
    return path


def same_runs(run: Path, whole: Path) -> bool:
    """Return whether two runs have the same journal, and the same last state, bit for bit."""
    ours, theirs = saved_steps(run)[-1], saved_steps(whole)[-1]
    if (run / METRICS).read_bytes() != (whole / METRICS).read_bytes():
        return False
    keys = [
        f"{kind}.{n}" for n in ours.facts.tensors for kind in ("params", "moments.m", "moments.v")
    ]
    first, second = state_reader(ours.state), state_reader(theirs.state)
    return ours.number == theirs.number and all(
        np.array_equal(first.read(key), second.read(key)) for key in keys
    )


def restored(
    encoder: np.ndarray, decoder: np.ndarray, sentinels: tuple[int, ...], end: int | None
) -> np.ndarray:
    """Return the sequence that spans were hidden of: the inverse of `Spans.apply`."""
    spans = {}
    current = []
    for token in decoder.tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        elif token != end:
            current.append(token)
    ids = []
    for token in encoder.tolist():
        if token != end:
            ids += spans.get(token, [token] if token not in sentinels else [])
    return np.asarray(ids, np.int32)
