"""What commands of pages and hints take for granted: a model with a tokenizer, texts, a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from tests.train.tiny import draw_weights, make_model

from .pages import ROOT
from .sessions import environment

DATA = (
    "--set model.source=SmolLM2-135M --set data.train.0.tokens=text/train"
    " --set data.evaluate.0.tokens=text/heldout"
)
FEW = (
    " --set run.steps=2 --set data.batch=2 --set data.seq=32 --set data.evaluate_batches=1"
    " --set optimizer.warmup=1 --set optimizer.decay_steps=1"
)
SMALL = " --set 'model.pipeline=upcycle{experts=2 top-k=2}'"
"""Of a recipe that upcycles, two experts."""

SCALED = """moecc 1
graph example {
  input %x : f32[batch=B, embed=4]
  param %up : f32[mlp=8, embed=4] = source("up.weight" : f32[mlp=8, embed=4])
  %a = contract %x, %up {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
  %b = scale %a {by=0.5} : f32[batch=B, mlp=8] @layers.0.ffn
  output y = %b
}
"""
"""What the pass of writing-a-pass.md matches."""


def make_stands(folder: Path) -> Path:
    """Make in `folder` what the pages take for granted, and return it."""
    model = draw_weights(make_model(folder / "SmolLM2-135M", num_hidden_layers=4))
    _tokenizer().save(str(model / "tokenizer.json"))
    for name in ("SOURCE", "MODEL"):
        (folder / name).symlink_to(model)
    (folder / "text.txt").write_text((ROOT / "docs" / "tour.md").read_text("utf-8"))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a note of some length\n" * 20)
    texts = [{"text": f"document {n} of the corpus, with a few words"} for n in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    rte = [
        {"premise": "a", "hypothesis": f"b{n}", "label": ("yes", "no")[n % 2]} for n in range(40)
    ]
    (folder / "rte.jsonl").write_text("".join(json.dumps(t) + "\n" for t in rte))
    np.save(folder / "tokens.npy", np.arange(8, dtype=np.int32).reshape(2, 4))
    (folder / "model.moe").write_text(SCALED)
    for command in (
        "import SmolLM2-135M -o dense.moe",
        "convert SmolLM2-135M SmolLM2-135M-Instruct.Q4_1.gguf --to gguf:llama",
        "convert SmolLM2-135M sparse -p 'upcycle{experts=2 top-k=2}' --to mixtral",
        "convert SmolLM2-135M smollm2-8x -p 'upcycle{experts=8 top-k=2}' --to mixtral",
        "tokens corpus.jsonl --tokenizer SmolLM2-135M --hold-out 0.1 --out text",
        f"train recipe:upcycle --out RUN {DATA}{FEW}{SMALL}",
    ):
        run(folder, f"moecc {command}")
    (folder / "tokens").symlink_to(folder / "text")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:  # noqa: F821
    """Return a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def run(folder: Path, line: str):
    """Run a line of a page, and fail with what it said unless it ends with 0."""
    done = subprocess.run(
        ["/bin/sh", "-c", line], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"$ {line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
