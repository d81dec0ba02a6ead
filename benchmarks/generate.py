"""Processor time of a generated token beside transformers, in pairs, one thread each.

    python benchmarks/generate.py FOLDER --torch PYTHON [--pairs 7] [--batch 1] [--format json]

FOLDER is a checkpoint that both read, such as what ``moecc convert … --to mixtral`` writes; PYTHON
an interpreter with torch and transformers.  Both continue the same prompt greedily on one core, in
turn; each is first in every other pair.  Reading the prompt is not counted.  The figure is the
median of the ratios of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Reply = dict[str, Any]
Ask = Callable[[list[list[int]], int], Reply]

PROMPT = 16
"""The tokens of a prompt."""


def ask_torch(python: str, folder: str) -> Ask:
    """Return what asks transformers, in a process of its own."""
    script = Path(__file__).with_name("generate_torch.py")
    process = subprocess.Popen(
        [python, str(script), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answers = process.stdin, process.stdout
    if not answers.readline():
        sys.exit(f"{python} cannot run transformers on {folder}")

    def continued(prompt: list[list[int]], count: int) -> Reply:
        print(json.dumps({"prompt": prompt, "tokens": count}), file=ask, flush=True)
        answer: Reply = json.loads(answers.readline())
        return answer

    return continued


def ask_moecc(folder: str) -> Ask:
    """Return what asks moecc, in this process."""
    from moecc.backend import get_backend
    from moecc.decoding import DecodeGraphs, DecodingBatch
    from moecc.model.open import open_model
    from moecc.types import F32

    model = open_model(folder)
    graphs = DecodeGraphs.of(model.graph)
    batch = DecodingBatch(graphs, model.params(), backend=get_backend("xla"), dtype=F32)

    def continued(prompt: list[list[int]], count: int) -> Reply:
        rows = [batch.begin(prompt).argmax(-1).tolist()]
        begin = time.process_time()
        for _ in range(count):
            rows.append(batch.step(rows[-1]).argmax(-1).tolist())
        seconds = time.process_time() - begin
        return {"tokens": [list(row) for row in zip(*rows, strict=True)], "seconds": seconds}

    return continued


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--torch", required=True, metavar="PYTHON")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    args = parser.parse_args()
    # One core for both, before either counts the cores that it may use.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    asks = {"transformers": ask_torch(args.torch, args.folder), "moecc": ask_moecc(args.folder)}
    prompt = [[100 + 7 * n + i for i in range(PROMPT)] for n in range(args.batch)]
    first = [ask(prompt, args.tokens)["tokens"] for ask in asks.values()]
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    for pair in range(args.pairs):
        for name in asks if pair % 2 else reversed(asks):
            seconds[name].append(asks[name](prompt, args.tokens)["seconds"] / args.tokens)
    ratios = [m / t for m, t in zip(seconds["moecc"], seconds["transformers"], strict=True)]
    report = {
        **{f"{name}_seconds": statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios),
        "same_tokens": first[0] == first[1],
    }  # fmt: skip
    if args.format == "json":
        print(json.dumps(report))
        return
    print(f"a token of {args.batch} texts, {PROMPT} to {PROMPT + args.tokens} long, "
          f"{args.pairs} pairs, processor time")  # fmt: skip
    for name in asks:
        print(f"  {name:13s} {report[f'{name}_seconds'] * 1e3:7.1f} ms")
    print(f"  ratio         {report['ratio']:7.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"  the tokens {'are the same' if report['same_tokens'] else 'DIFFER'}")


if __name__ == "__main__":
    main()
