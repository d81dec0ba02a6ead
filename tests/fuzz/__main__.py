"""``python -m tests.fuzz``: fuzz all grammars for some minutes, or a number of executions.

Prints one line a grammar and writes the counts as JSON.  Exit code 1 if an input caused an error
that is none of moecc's: the inputs and their traces are in the folder ``found/`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from .grammars import GRAMMARS
from .rig import Fuzzer, minimised, print_report, report, same_failure, save

FOUND = Path(__file__).parent / "found"
ROUND = 500


def main() -> int:
    """Fuzz, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for how long, all grammars together")
    parser.add_argument("--executions", type=int, help="how many of each grammar")
    parser.add_argument("--grammar", action="append", choices=list(GRAMMARS), help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--command-line", type=int, metavar="N", help="N commands instead")
    parser.add_argument("--json", type=Path, help="where the counts go")
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.command_line:
        from .command_line import fuzz_commands

        found = fuzz_commands(arguments.command_line, arguments.seed, FOUND)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(json.dumps(found, indent=1))
        return 1 if found["failures"] else 0
    fuzzers = [Fuzzer(GRAMMARS[n], arguments.seed) for n in arguments.grammar or GRAMMARS]
    with suppress(KeyboardInterrupt):  # what was counted until then is reported
        _fuzz(fuzzers, arguments.executions, arguments.minutes)
    for fuzzer in fuzzers:
        for failure in fuzzer.failures.values():
            print(f"{failure.grammar}: {failure.signature}: {_kept(failure)}", file=sys.stderr)
    found = report(fuzzers, time.monotonic() - began, arguments.seed)
    print_report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 1 if found["failures"] else 0


def _fuzz(fuzzers: list[Fuzzer], executions: int | None, minutes: float | None) -> None:
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


def _kept(failure: object) -> Path:
    from dataclasses import replace

    from .rig import Failure

    assert isinstance(failure, Failure)
    grammar = GRAMMARS[failure.grammar]
    if "Hang" not in failure.signature and "Grew" not in failure.signature:
        small = minimised(failure.data, lambda d: same_failure(grammar, failure.signature, d))
        failure = replace(failure, data=small)
    return save(failure, FOUND)


if __name__ == "__main__":
    sys.exit(main())
