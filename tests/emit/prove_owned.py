"""``make proof-owned``: real models as emitted mixtures, in transformers and sentence-transformers.

    python -m tests.emit.prove_owned --judge PYTHON --work DIR --out FILE --text TEXT

PYTHON has torch, transformers, accelerate and sentence-transformers.  ``smollm2=…``, ``minilm=…``,
``gemma3=…`` and ``whisper=…`` name checkpoints; what DIR holds already is not made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import moecc

PASSES = {
    "smollm2": "upcycle{experts=8 top-k=2 router-std=0.1 layers=every:5}",
    "minilm": "upcycle{experts=4 top-k=2 router-std=0.1}",
    "gemma3": "upcycle{experts=4 top-k=2 router-std=0.1}",
    "whisper": "upcycle{experts=4 top-k=2 router-std=0.1}",
}


def asked(python: str, answer: Path, *command: str) -> dict[str, Any]:
    """Return what the judge prints, which is kept in a file."""
    if not answer.is_file():
        script = str(Path(__file__).parent / "owned.py")
        environment = {**os.environ, "PYTHONPATH": ""}
        done = subprocess.run(
            [python, script, *command], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answer.write_text(done.stdout)
    return json.loads(answer.read_text().splitlines()[-1])


def trained_alike(folder: Path, verdict: dict[str, Any]) -> dict[str, Any]:
    """Open what Trainer saved, and compare its logits with those that the judge computed."""
    expected = np.array(verdict.pop("logits"))
    tokens = np.array([verdict.pop("tokens")], np.int32)
    with moecc.open(folder) as model:
        logits = model.run({"tokens": tokens})["logits"][0, -1]
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    done = subprocess.run(
        [sys.executable, "-m", "moecc", "verify", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {**verdict, "read_back": difference, "verify": done.returncode}


def main():
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=CHECKPOINT")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    report = {"date": datetime.date.today().isoformat()}
    for model in options.models:
        name, _, checkpoint = model.partition("=")
        folder = options.work / name
        if not folder.is_dir():
            opened = moecc.open(checkpoint, padding=name == "minilm")  # sentences are padded
            opened.apply(PASSES[name]).emit("torch", folder, dtype="f32")
        report[name] = {"passes": PASSES[name]}

        def answer(command, *arguments, at=folder):
            file = at.parent / f"{at.name}.{command}.json"
            return asked(options.judge, file, command, str(at), *arguments)

        if name == "minilm":
            report[name]["embed"] = answer("embed", checkpoint)
            continue
        if name == "whisper":
            report[name]["transcribe"] = answer("transcribe", checkpoint)
            continue
        report[name]["generate"] = answer("generate", "The capital of France is")
        if name == "smollm2":
            trained = options.work / f"{name}-trained"
            verdict = answer("train", str(trained), options.text)
            report[name]["train"] = trained_alike(trained, verdict)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
