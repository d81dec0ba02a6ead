"""Real checkpoints as every target that fits, and by every method, each result compared.

    python -m tests.proof.real --out FILE NAME=CHECKPOINT …

Every conversion is a command of its own with ``--verify``: logits of the result in float32 against
those of the source.  A target is tried by copies, the first that fits by all methods, too.  With
``--text`` statistics of the model are taken of it for the activation split.  With ``--judge`` an
interpreter with transformers says first what the source itself computes, in float32 and float64; a
GGUF file is written as a folder of its own family for that.  What FILE holds already is not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moecc.types import Array
from tests.proof.cells import METHODS, passes_for

ROOT = Path(__file__).parents[2]

APART = ("BTX", "LoRA")
"""Methods that need other models; `examples/mix_two_models.py` and the pages show them."""

CAPTURED = "activation split"
"""The method that needs statistics."""


def moecc(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moecc", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fitting(checkpoint: str) -> list[str]:
    """Return the targets that `inspect` says the model fits, `st_moe` last."""
    found = json.loads(moecc("inspect", checkpoint, "--format", "json").stdout)
    return [name for name, target in found["targets"].items() if target["fits"]]


def cells(targets: list[str], *, captured: bool) -> Iterator[tuple[list[str], str]]:
    """Yield methods, with the targets of which the first that does not reject it counts."""
    for target in targets:
        yield [target], "copy"
    for method in METHODS:
        if method not in ("copy", *APART) and (captured or method != CAPTURED):
            yield targets, method


def capture(checkpoint: str, text: Path | None, out: Path):
    """Take statistics of a model, if there is a text to take them of."""
    if text is None:
        return
    few = ("--batches", "4", "--batch", "2", "--sequence", "512")
    done = moecc("capture", checkpoint, "--text", str(text), "--out", str(out), *few)
    if done.returncode:
        raise SystemExit(done.stderr)


def judged(python: str, checkpoint: str, work: Path) -> dict[str, Any]:
    """Return how far moecc and transformers differ on a source."""
    folder = Path(checkpoint)
    if folder.is_file():
        folder = work / "folder"
        family = json.loads(moecc("inspect", checkpoint, "--format", "json").stdout)["family"]
        moecc("convert", checkpoint, str(folder), "--to", family, "--dtype", "f32")
    command = [python, "-W", "ignore", "-m", "tests.proof.real_in_transformers", str(folder)]
    done = subprocess.run(
        [*command, str(work / "there.npz")], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    there = dict(np.load(work / "there.npz"))
    expected = {name: there.pop(name) for name in ("float32", "float64")}
    np.savez(work / "inputs.npz", **there)
    made = {"target": "transformers", "method": "the source itself"}
    for dtype, name in (("f32", "float32"), ("f64", "float64")):
        out = work / f"{dtype}.npy"
        words = ["--inputs", str(work / "inputs.npz"), "--outputs", str(out), "--dtype", dtype]
        moecc("run", checkpoint, *words, "--router-dtype", dtype)
        made[f"difference_{name}"] = relative(np.load(out), expected[name])
    own = relative(expected["float32"], expected["float64"])
    sizes = {name: list(values.shape) for name, values in there.items()}
    return {**made, "transformers_float32": own, "inputs": sizes, **json.loads(done.stdout)}


def relative(found: Array, expected: Array) -> float:
    """Return the largest difference, of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def run(checkpoint: str, target: str, method: str, work: Path) -> dict[str, Any]:
    """Convert and compare; return what was promised and measured, or why it was rejected."""
    out, passes = work / "out", passes_for(METHODS[method], target)
    words = ["convert", checkpoint, str(out), "-p", passes, "--to", target, "--verify"]
    done = moecc(*words, *(["--capture", str(work / "captured")] * (method == CAPTURED)))
    cell = {"target": target, "method": method, "passes": passes}
    if done.returncode:
        line = next(l for l in done.stderr.splitlines() if l.startswith("error:"))
        return {**cell, "exit": done.returncode, "reason": line.removeprefix("error: ")}
    receipt = json.loads((out / "moecc_receipt.json").read_text("utf-8"))
    verified = receipt["verified"]
    subprocess.run(["rm", "-r", str(out)], check=True)
    return {
        **cell, "exit": 0, "promised": receipt["promised"]["kind"],
        "because": receipt["promised"].get("reason", ""),
        "output": verified["output"], "inputs": verified["inputs"],
        "difference": verified["difference"]["max_relative"],
    }  # fmt: skip


def first(checkpoint: str, targets: list[str], method: str, work: Path) -> dict[str, Any]:
    """Convert by a method to the first target that can hold the result, or to none."""
    for target in targets:
        cell = run(checkpoint, target, method, work)
        if not cell["exit"]:
            break
    return cell


def note(out: Path, name: str, done: dict[str, list[dict[str, Any]]]):
    """Write what was found so far, and print the last."""
    print(name, done[name][-1], file=sys.stderr, flush=True)
    out.write_text(json.dumps(done, indent=1) + "\n", "utf-8")


def main():
    """Run every cell of every checkpoint, and write the results as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--judge", metavar="PYTHON", help="an interpreter with transformers")
    parser.add_argument("--text", type=Path, help="a text to take statistics of")
    options = parser.parse_args()
    done = {}
    if options.out.exists():
        done = json.loads(options.out.read_text("utf-8"))
    for name, _, checkpoint in (text.partition("=") for text in options.checkpoints):
        found = done.setdefault(name, [])
        known = {(cell["target"], cell["method"]) for cell in found}
        with tempfile.TemporaryDirectory() as work:
            if options.judge and ("transformers", "the source itself") not in known:
                found.append(judged(options.judge, checkpoint, Path(work)))
                note(options.out, name, done)
            capture(checkpoint, options.text, Path(work) / "captured")
            fits = fitting(checkpoint)
            for targets, method in cells(fits, captured=options.text is not None):
                if any((target, method) in known for target in targets):
                    continue
                found.append(first(checkpoint, targets, method, Path(work)))
                note(options.out, name, done)


if __name__ == "__main__":
    main()
