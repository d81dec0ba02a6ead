"""``make proof-chain``: a real model from dense to trained experts, and transformers judges it.

    python -m tests.proof.chain [--python PYTHON] [--work FOLDER] [--out FILE]

SmolLM2-135M is upcycled and trained on for a few steps, evaluated, exported and continues a text,
by the commands of docs/training.md.  PYTHON has torch and transformers 5, and is by default the
first that MOECC_PARITY_PYTHON lists: it loads the export, computes the same held-out loss, and
continues the same text.  Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reports import about, deliver, work_folder

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("chain_in_transformers.py")
SOURCE = "SmolLM2-135M.gguf"
EXPORT = "smollm2-8x"
PROMPT = "The name of an axis is"
SEQUENCE, BATCH, STEPS, CONTINUED = 128, 2, 8, 24
TOLERANCE = 1e-4
"""How far apart the two held-out losses may be, in nats a token."""

ALONE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
JSON = ("--format", "json")
FEW_STEPS = (
    "model.pipeline=upcycle{experts=8 top-k=2 layers=every:6}", f"run.steps={STEPS}",
    f"data.batch={BATCH}", f"data.seq={SEQUENCE}", "optimizer.warmup=2",
    "optimizer.decay_steps=4", "run.evaluate_steps=0", "data.evaluate_batches=4",
)  # fmt: skip
"""Five of thirty layers become sparse, so that a machine with little memory can train them."""


@dataclass
class Chain:
    """Commands that are run in one folder, with what each took."""

    work: Path
    commands: list[dict[str, Any]] = field(default_factory=list)

    def moecc(self, *words: str) -> str:
        """Run a command of moecc and return what it prints; it ends the proof if it fails."""
        return self._run([sys.executable, "-m", "moecc", *words], shlex.join(("moecc", *words)))

    def transformers(self, python: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what transformers makes of the export."""
        text = self._run([python, str(PROBE), json.dumps(asked)], "transformers")
        return json.loads(text.splitlines()[-1])

    def _run(self, words: list[str], shown: str) -> str:
        print(f"$ {shown}", file=sys.stderr)
        start = time.monotonic()
        with tempfile.TemporaryFile("w+") as stdout:
            process = subprocess.Popen(words, cwd=self.work, stdout=stdout, env=_environment())
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{shown}: exit code {process.returncode}")
            stdout.seek(0)
            text = stdout.read()
        self.commands.append({
            "command": shown,
            "seconds": round(time.monotonic() - start, 1),
            "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_bytes": used.ru_maxrss * 1024,
        })  # fmt: skip
        return text


def _environment() -> dict[str, str]:
    """Return the environment, without devices that tests force, and without a network."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = os.pathsep.join((str(ROOT), kept.get("PYTHONPATH", "")))
    return {**kept, "PYTHONPATH": paths, **ALONE}


def prove(source: Path, python: str, work: Path) -> dict[str, Any]:
    """Run the chain on the checkpoint `source` in the folder `work`, and return what was found."""
    (work / SOURCE).symlink_to(source.resolve())
    (work / "docs").symlink_to(ROOT / "docs")
    chain = Chain(work)
    chain.moecc("tokens", "docs", "--include", "*.md", "--split", "paragraph", "--tokenizer",
                SOURCE, "--hold-out", "0.03", "--out", "tokens")  # fmt: skip
    places = (
        f"model.source={SOURCE}", "data.train.0.tokens=tokens/train",
        "data.evaluate.0.tokens=tokens/heldout",
    )  # fmt: skip
    sets = [word for one in (*places, *FEW_STEPS) for word in ("--set", one)]
    chain.moecc("train", "recipe:upcycle", "--out", "run", *sets)
    compared = ("--data", "tokens/heldout", "--sequence", str(SEQUENCE), "--batches", "1000")
    scores = json.loads(chain.moecc("evaluate", SOURCE, "run@best", *compared, *JSON))
    dense, sparse = (model["sets"]["heldout"] for model in scores["models"])
    made = json.loads(chain.moecc("convert", "run@best", EXPORT, "-p", "", "--to", "auto", *JSON))
    chain.moecc("verify", EXPORT)
    longer = ("--prompt", PROMPT, "--tokens", str(CONTINUED))
    continued = json.loads(chain.moecc("generate", EXPORT, *longer, *JSON))
    asked = {
        "model": EXPORT, "tokens": "tokens/heldout", "seq": SEQUENCE, "prompt": PROMPT,
        "continued": CONTINUED,
    }  # fmt: skip
    judged = chain.transformers(python, asked)
    text = PROMPT + continued["texts"][0]["text"].removeprefix(PROMPT)
    return {
        "family": made["family_to"],
        "parameters": made["parameters"],
        "steps": STEPS,
        "trained_tokens": _trained_tokens(work / "run"),
        "held_out": {
            "tokens": sparse["tokens"],
            "dense": dense["loss"],
            "sparse": sparse["loss"],
            "sparse_less_dense": sparse["against_first"],
            "transformers": judged["loss"],
            "transformers_tokens": judged["tokens"],
            "apart": abs(judged["loss"] - sparse["loss"]),
        },
        "text": text,
        "transformers": judged,
        "commands": chain.commands,
    }


def failures(found: dict[str, Any]) -> list[str]:
    """Return what is not as it has to be."""
    held_out, judged = found["held_out"], found["transformers"]
    checks = {
        "the losses differ": held_out["apart"] <= TOLERANCE,
        "transformers predicts other tokens": held_out["tokens"] == judged["tokens"],
        "transformers reports problems as it loads": not judged["report"],
        "the tokenizer of the export is another one": not judged["encoded_otherwise"],
        "transformers continues another text": judged["text"] == found["text"],
    }
    return [text for text, holds in checks.items() if not holds]


def _trained_tokens(run: Path) -> int:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return max(int(line.get("tokens", 0)) for line in lines)


def interpreter() -> str:
    """Return the interpreter with transformers: the first that the parity tests are told."""
    listed = os.environ.get("MOECC_PARITY_PYTHON", "").split(os.pathsep)
    return next((path for path in listed if path), sys.executable)


def smollm2() -> Path:
    """Return the checkpoint, which is downloaded once. It ends the proof if it cannot be."""
    script = ROOT / "examples" / "downloads.py"
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return Path(done.stdout.splitlines()[-1])


def main() -> int:
    """Run, print, and return 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=interpreter(), help="has torch and transformers 5")
    parser.add_argument("--work", type=Path, help="the folder to work in, which is kept")
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    asked = parser.parse_args()
    with work_folder(asked.work, "moecc-chain-") as work:
        found = {**about(), **prove(smollm2(), asked.python, work)}
    return deliver({**found, "failures": failures(found)}, asked.out)


if __name__ == "__main__":
    sys.exit(main())
