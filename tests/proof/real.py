"""Real checkpoints as every target that fits, and by every method, each result compared.

    python -m tests.proof.real --out FILE NAME=CHECKPOINT …

Every conversion is a command of its own with ``--verify``: logits of the result in float32 against
those of the source.  A target is tried by copies, the first that fits by all methods, too.  With
``--text`` statistics of the model are taken of it for the activation split.  What FILE holds
already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.proof.cells import METHODS, passes_for

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


def cells(targets: list[str], *, captured: bool) -> Iterator[tuple[str, str]]:
    """Yield targets and methods."""
    for target in targets:
        yield target, "copy"
    for method in METHODS:
        if method not in ("copy", *APART) and (captured or method != CAPTURED):
            yield targets[0], method


def capture(checkpoint: str, text: Path | None, out: Path) -> None:
    """Take statistics of a model, if there is a text to take them of."""
    if text is None:
        return
    done = moecc("capture", checkpoint, "--text", str(text), "--out", str(out))
    if done.returncode:
        raise SystemExit(done.stderr)


def run(checkpoint: str, target: str, method: str, work: Path) -> dict[str, Any]:
    """Convert and compare; return what was promised and measured, or why it was rejected."""
    out, passes = work / "out", passes_for(METHODS[method], target)
    words = ["convert", checkpoint, str(out), "-p", passes, "--to", target, "--verify"]
    done = moecc(*words, *(["--capture", str(work / "captured")] * (method == CAPTURED)))
    cell: dict[str, Any] = {"target": target, "method": method, "passes": passes}
    if done.returncode:
        line = next(l for l in done.stderr.splitlines() if l.startswith("error:"))
        return {**cell, "exit": done.returncode, "reason": line.removeprefix("error: ")}
    receipt = json.loads((out / "moecc_receipt.json").read_text("utf-8"))
    verified = receipt["verified"]
    subprocess.run(["rm", "-r", str(out)], check=True)
    return {
        **cell, "exit": 0, "promised": receipt["promised"]["kind"],
        "output": verified["output"], "inputs": verified["inputs"],
        "difference": verified["difference"]["max_relative"],
    }  # fmt: skip


def main() -> None:
    """Run every cell of every checkpoint, and write the results as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="a text to take statistics of")
    options = parser.parse_args()
    done: dict[str, list[dict[str, Any]]] = {}
    if options.out.exists():
        done = json.loads(options.out.read_text("utf-8"))
    for name, _, checkpoint in (text.partition("=") for text in options.checkpoints):
        found = done.setdefault(name, [])
        known = {(cell["target"], cell["method"]) for cell in found}
        with tempfile.TemporaryDirectory() as work:
            capture(checkpoint, options.text, Path(work) / "captured")
            for cell in cells(fitting(checkpoint), captured=options.text is not None):
                if cell in known:
                    continue
                found.append(run(checkpoint, *cell, Path(work)))
                print(name, found[-1], file=sys.stderr, flush=True)
                options.out.write_text(json.dumps(done, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
