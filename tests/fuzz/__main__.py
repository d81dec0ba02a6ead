"""``python -m tests.fuzz``: fuzz all grammars for some minutes, or a number of executions.

Says how far it is, one line a grammar, and writes the counts as JSON as it goes.  Exit code 1 if an
input caused an error that is none of moecc's: the inputs and their traces are in the folder
``found/`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .grammars import GRAMMARS
from .rig import Failure, Fuzzer, minimised, report, same_failure, save

FOUND = Path(__file__).parent / "found"
ROUND = 500
SAID_EVERY_SECONDS = 30.0


def main() -> int:
    """Fuzz, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for how long, all grammars together")
    parser.add_argument("--executions", type=int, help="how many of each grammar")
    parser.add_argument("--grammar", action="append", choices=list(GRAMMARS), help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--command-line", type=int, metavar="N", help="N commands instead")
    parser.add_argument("--json", type=Path, help="where the counts go")
    asked = parser.parse_args()
    found = _commands(asked) if asked.command_line else _executions(asked)
    print(json.dumps(found, indent=1))
    return 1 if found["failures"] else 0


def _commands(asked: argparse.Namespace) -> dict[str, Any]:
    from .command_line import fuzz_commands

    found = {}
    said = time.monotonic()
    for found in fuzz_commands(asked.command_line, asked.seed, FOUND):
        _write(asked.json, found)
        if time.monotonic() - said > SAID_EVERY_SECONDS:
            said = time.monotonic()
            print(
                f"{found['commands']:>6,} commands, {found['failures']} failures", file=sys.stderr
            )
    return found


def _executions(asked: argparse.Namespace) -> dict[str, Any]:
    fuzzers = [Fuzzer(GRAMMARS[n], asked.seed) for n in asked.grammar or GRAMMARS]
    kept = set()
    began = said = time.monotonic()
    with suppress(KeyboardInterrupt):  # what was counted until then is reported
        for _ in _rounds(fuzzers, asked.executions, asked.minutes):
            _keep_new(fuzzers, kept)
            _write(asked.json, report(fuzzers, time.monotonic() - began, asked.seed))
            if time.monotonic() - said > SAID_EVERY_SECONDS:
                said = time.monotonic()
                _say(fuzzers)
    _say(fuzzers)
    return report(fuzzers, time.monotonic() - began, asked.seed)


def _rounds(fuzzers: list[Fuzzer], executions: int | None, minutes: float | None) -> Iterator[None]:
    """Run the grammars in turns: each has the same number of executions, or the same time."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    most = executions or sys.maxsize
    if not minutes and not executions:
        end = time.monotonic() + 60
    while time.monotonic() < end and any(f.tally.executions < most for f in fuzzers):
        for fuzzer in fuzzers:
            share = time.monotonic() + 1.0 if end < float("inf") else float("inf")
            left = min(ROUND, most - fuzzer.tally.executions)
            fuzzer.run(left, until=min(end, share))
        yield


def _say(fuzzers: list[Fuzzer]):
    for fuzzer in fuzzers:
        print(fuzzer.line, file=sys.stderr, flush=True)


def _write(file: Path | None, found: dict[str, Any]):
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _keep_new(fuzzers: list[Fuzzer], kept: set[str]):
    """Make the inputs of failures that are new small, write them, and say where."""
    for fuzzer in fuzzers:
        for signature in fuzzer.failures.keys() - kept:
            kept.add(signature)
            path = _kept(fuzzer.failures[signature])
            print(f"{fuzzer.grammar.name}: {signature}: {path}", file=sys.stderr, flush=True)


def _kept(failure: Failure) -> Path:
    grammar = GRAMMARS[failure.grammar]
    if "Hang" not in failure.signature and "Grew" not in failure.signature:
        small = minimised(failure.data, lambda d: same_failure(grammar, failure.signature, d))
        failure = replace(failure, data=small)
    return save(failure, FOUND)


if __name__ == "__main__":
    sys.exit(main())
