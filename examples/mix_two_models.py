"""Two fine-tunes of one model become the experts of a mixture, with a router from statistics.

    python examples/mix_two_models.py [--out FOLDER] [--smoke]

A small decoder over bytes is trained on this documentation and on the source code of moecc, then
on for each alone (Branch-Train-Mix, arXiv 2403.07816).  The two become the experts of one model,
all else the mean of both, and ridge regression on their texts makes the router (DUME, arXiv
2603.29765): nothing is trained after the mixing.  Held-out losses on both texts are compared with
the branches, their average, and a mixture with a drawn router; ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from script import OUT, call, exit_code, step

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "examples" / "mix_two_models"
TEXTS = {
    "prose": ("README.md", "docs", "--include", "*.md", "--split", "paragraph"),
    "code": ("moecc", "passes", "backends", "--include", "*.py", "--split", "paragraph"),
}
"""The domains: what `moecc tokens` reads of each."""

SMOKE = (
    "run.steps=4", "run.evaluate_steps=0", "optimizer.warmup=1", "optimizer.decay_steps=1",
    "data.evaluate_batches=1",
)  # fmt: skip

ROUTER = "router-init=ridge router-std=4.0"
"""Logits that leave little doubt: a token is for one of the models."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT / "mix", help="the folder to write into")
    parser.add_argument("--smoke", action="store_true", help="a few steps, and few rows")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments.out, is_smoke=arguments.smoke))


def run(out: Path, *, is_smoke: bool) -> None:
    """Make tokens, train, branch, mix, compare. Raises CommandError if a command fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sets, few = (SMOKE, ("--batches", "1")) if is_smoke else ((), ())
    with step("Tokens of two domains"):
        for name, (*texts, _, pattern, _, split) in TEXTS.items():
            call("tokens", *(ROOT / text for text in texts), "--include", pattern, "--split", split,
                 "--tokenizer", "bytes", "--hold-out", "0.1", "--out", out / name)  # fmt: skip
    with step("A model of both"):
        source = f"model.source={ROOT / 'examples' / 'train_on_docs' / 'decoder'}"
        train(out, "both", tuple(TEXTS), HERE / "both.toml", (source, *sets))
    with step("A branch of each"):
        source = f"model.source={out / 'both'}"
        for name in TEXTS:
            train(out, f"{name}-branch", (name,), HERE / "branch.toml", (source, *sets))
    with step("Statistics of both texts, and the mixtures"):
        mix(out, few)
    with step("Held-out losses, in nats a byte"):
        models = ("both", "prose-branch", "code-branch", "average", "drawn", "fitted")
        data = [word for name in TEXTS for word in ("--data", out / name / "heldout")]
        read = ("--sequence", "128", "--batch", "16", *few)
        call("evaluate", *(out / name for name in models), *data, *read)


def mix(out: Path, few: Sequence[str]) -> None:
    """Write the average of the branches, and their mixtures with a drawn and a fitted router."""
    base, other = out / "prose-branch", f"code={out / 'code-branch'}"
    texts = [f"base={out / 'prose' / 'train'}", f"code={out / 'code' / 'train'}"]
    given = [word for text in texts for word in ("--text", text)]
    read = ("--sequence", "128", "--batch", "8", *(few or ("--batches", "32")))
    call("capture", base, *given, *read, "--out", out / "captured")
    mixed = "upcycle{experts=2 top-k=2 sources=base,code rest=mean"
    for name, passes in (
        ("average", f"{mixed}}},to-dense{{how=mean}}"), ("drawn", f"{mixed}}}"),
        ("fitted", f"{mixed} {ROUTER}}}"),
    ):  # fmt: skip
        call("convert", base, out / name, "--experts", other, "--capture", out / "captured",
             "-p", passes, "--to", "auto", "--no-check")  # fmt: skip


def train(out: Path, name: str, texts: Sequence[str], recipe: Path, sets: Sequence[str]) -> None:
    """Train a run on the texts of some domains."""
    words = []
    for number, text in enumerate(texts):
        for part, folder in (("train", "train"), ("evaluate", "heldout")):
            words += ["--set", f"data.{part}.{number}.tokens={out / text / folder}"]
    for one in sets:
        words += ["--set", one]
    call("train", recipe, "--out", out / name, *words)


if __name__ == "__main__":
    sys.exit(main())
