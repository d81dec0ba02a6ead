"""From nothing to a trained mixture of experts, on this repository's own documentation.

    make demo-train        or        python examples/train_on_docs.py [--out FOLDER] [--smoke]

A decoder over bytes is trained from random parameters, upcycled, and trained on; beside it the
dense model is trained on for as many tokens.  Both are compared on held-out text, the sparse one is
exported as a Mixtral checkpoint, verified, and continues a text.  Every step is a command of
``moecc``, which is shown; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from script import OUT, call, exit_code, step

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "examples" / "train_on_docs"
PROMPT = "A pass is "
WRITTEN = {
    "tokens": "train/tokens.json", "dense": "lineage.json", "sparse": "lineage.json",
    "control": "lineage.json", "mixtral": "moecc_manifest.json",
}  # fmt: skip
"""The folders that are written, each with a file by which it is known."""

SMOKE = (
    "run.steps=8", "run.evaluate_steps=0", "optimizer.warmup=2", "optimizer.decay_steps=4",
    "data.evaluate_batches=1",
)  # fmt: skip
"""Values of both recipes that only show that every command works."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT / "train", help="the folder to write into")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of both recipes"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, and few rows")
    arguments = parser.parse_args(argv)
    sets = [*(SMOKE if arguments.smoke else ()), *arguments.set]
    rows = ("--batches", "1") if arguments.smoke else ()
    return exit_code(lambda: run(arguments.out, sets, rows))


def run(out: Path, sets: Sequence[str], rows: Sequence[str]) -> None:
    """Make tokens, train, upcycle, train on, compare, export.

    Args:
      out: where; what an earlier run wrote there is replaced.
      sets: values of both recipes.
      rows: how much of the held-out text is read.

    Raises:
      CommandError: a command failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, known_by in WRITTEN.items():
        if (out / name / known_by).is_file():
            shutil.rmtree(out / name)
    read = ["--data", out / "tokens" / "heldout", "--sequence", "128", *rows]
    tokens = out / "tokens"
    places = {"data.train.0.tokens": tokens / "train", "data.evaluate.0.tokens": tokens / "heldout"}
    more = [*(f"{key}={place}" for key, place in places.items()), *sets]
    given = [word for one in more for word in ("--set", one)]
    trained_on = [*given, "--set", f"model.source={out / 'dense'}"]
    with step("Tokens of the documentation, a part of them held out"):
        texts = [ROOT / "README.md", ROOT / "docs"]
        call("tokens", *texts, "--include", "*.md", "--split", "paragraph", "--tokenizer", "bytes",
             "--hold-out", "0.1", "--out", tokens)  # fmt: skip
    with step("A dense model, from random parameters"):
        call("train", HERE / "dense.toml", "--out", out / "dense", *given)
    with step("Upcycled, and trained on"):
        call("train", HERE / "sparse.toml", "--out", out / "sparse", *trained_on)
    with step("The control: the dense model, trained on for as many tokens"):
        control = ["--set", "model.pipeline=''"]
        call("train", HERE / "sparse.toml", "--out", out / "control", *trained_on, *control)
    with step("Held-out losses, in nats a byte"):
        runs = [out / "dense", out / "control", out / "sparse"]
        call("evaluate", *runs, *read, "--batch", "16")
    with step("Which bytes go to which expert"):
        call("specialise", out / "sparse", *read)
    with step("Exported, and verified"):
        call("convert", out / "sparse", out / "mixtral", "-p", "", "--to", "mixtral")
        call("verify", out / "mixtral", "--against", out / "sparse")
    with step("A text, continued"):
        call("generate", out / "mixtral", "--prompt", PROMPT, "--tokens", "60")


if __name__ == "__main__":
    sys.exit(main())
