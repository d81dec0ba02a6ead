"""``make proof-splits``: splits by activation beside others, and pruning by saliency beside draws.

    python -m tests.proof.splits [MODEL] --out FILE [--batches N]

MODEL is by default SmolLM2-135M-Instruct, from a package of PyPI.
Half of the topics of Python's ``help()`` are the text that statistics are taken of, the other half
is held out.  Each split gives a token half of the neurons: six parts of which two are chosen, and a
quarter of the neurons for all.  The split with centroids then keeps four parts of six.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from texts import help_topics

from tests.reports import about

from .chain import smollm2

SPLIT = "experts=6 top-k=2 shared=0.25"
WAYS = {
    "index": f"upcycle{{{SPLIT} split=index}}",
    "random": f"upcycle{{{SPLIT} split=random}}",
    "activation, a drawn router": f"upcycle{{{SPLIT} split=activation}}",
    "activation, ridge": f"upcycle{{{SPLIT} split=activation router-init=ridge}}",
    "activation, centroids": f"upcycle{{{SPLIT} split=activation router-init=centroids}}",
}
PRUNED = {
    "saliency": ("prune{keep=4 by=saliency}", 0),
    "share": ("prune{keep=4 by=share}", 0),
    "draw": ("prune{keep=4}", 0),
    "draw, seed 1": ("prune{keep=4}", 1),
    "draw, seed 2": ("prune{keep=4}", 2),
}
"""Passes, and the seed of what is drawn."""


def moecc(*words: object) -> dict[str, Any]:
    """Run a command of moecc and return its JSON. Raises SystemExit if it fails."""
    command = [sys.executable, "-m", "moecc", *map(str, words), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")
    return json.loads(done.stdout)


def make_texts(model: str, work: Path):
    """Write the token folders ``captured-text`` and ``held``."""
    pieces = help_topics().pieces
    for name, part in (("captured-text", pieces[::2]), ("held", pieces[1::2])):
        file = work / f"{name}.txt"
        file.write_text("\n\n".join(part), "utf-8")
        moecc("tokens", file, "--tokenizer", model, "--out", work / name)


def compared(models: list[Path | str], work: Path, batches: int) -> list[dict[str, Any]]:
    """Return the held-out loss of each, and how it differs from that of the first."""
    words = ["--data", work / "held", "--sequence", 512, "--batch", 1, "--batches", batches]
    found = moecc("evaluate", *models, *words)["models"]
    return [next(iter(one["sets"].values())) for one in found]


def main():
    """Capture, convert, evaluate, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8, help="sequences of 512 held-out tokens")
    options = parser.parse_args()
    options.model = options.model or str(smollm2())
    done = {
        **about(),
        "text": help_topics().name,
        "model": Path(options.model).name,
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_texts(options.model, work)
        first, second = work / "captured", work / "captured-of-split"
        text = ["--text", work / "captured-text", "--batches", 8]
        done["captured tokens"] = moecc("capture", options.model, *text, "--out", first)["tokens"]
        folders = {name: work / name for name in (*WAYS, *PRUNED)}
        for name, passes in WAYS.items():
            words = ["-p", passes, "--to", "st_moe", "--capture", first]
            moecc("convert", options.model, folders[name], *words)
        split = folders["activation, centroids"]
        moecc("capture", split, *text, "--out", second)
        for name, (passes, seed) in PRUNED.items():
            words = ["-p", passes, "--to", "st_moe", "--capture", second, "--seed", seed]
            moecc("convert", split, folders[name], *words)
        ways = compared([options.model, *(folders[n] for n in WAYS)], work, options.batches)
        done["splits"] = dict(zip(("dense", *WAYS), ways, strict=True))
        kept = compared([split, *(folders[n] for n in PRUNED)], work, options.batches)
        done["pruned"] = dict(zip(("six parts", *PRUNED), kept, strict=True))
    options.out.write_text(json.dumps(done, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
