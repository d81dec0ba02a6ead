"""Processor time of `moecc generate` beside transformers, from start to exit, in pairs.

    python benchmarks/first_hour.py FOLDER --torch PYTHON [--tokens 1 16 64 200] [--pairs 3]

FOLDER is a checkpoint that both read, such as what ``moecc convert … --to mixtral`` writes; PYTHON
an interpreter with torch and transformers.  Both continue one prompt greedily in float32 on one
core; each is first in every other pair, and a run of each before the pairs is not counted: it
compiles, and brings the files into memory.  The figures are medians, and medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PROMPT = "Gravity is the force that"

TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, count = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=int(count), do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""


def measure(command: Sequence[str]) -> tuple[float, str]:
    """Return the processor seconds of a process and its children, and what it printed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(command[:4])} …")
    return usage.ru_utime + usage.ru_stime, text.strip()


def compare(folder: str, python: str, count: int, pairs: int) -> dict[str, Any]:
    """Return the figures of texts of `count` tokens."""
    moecc = [sys.executable, "-m", "moecc", "generate", folder, "--prompt", PROMPT]
    commands = {
        "transformers": [python, "-c", TRANSFORMERS, folder, PROMPT, str(count)],
        "moecc": [*moecc, "--tokens", str(count)],
    }
    texts = [measure(command)[1] for command in commands.values()]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for pair in range(pairs):
        for name in commands if pair % 2 else reversed(commands):
            seconds[name].append(measure(commands[name])[0])
    ratios = [m / t for m, t in zip(seconds["moecc"], seconds["transformers"], strict=True)]
    return {
        "tokens": count,
        **{f"{name}_seconds": statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios),
        "same_text": texts[0] == texts[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--torch", required=True, metavar="PYTHON")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 200])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for count in args.tokens:
        row = compare(args.folder, args.torch, count, args.pairs)
        if args.format == "json":
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{count:4d} tokens: {row['moecc_seconds']:6.1f} s beside "
            f"{row['transformers_seconds']:6.1f} s, ratio {row['ratio']:.2f} "
            f"({row['least']:.2f} to {row['largest']:.2f}), "
            f"{'the same text' if row['same_text'] else 'the texts DIFFER'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
