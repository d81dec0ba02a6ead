"""What `moecc compile --quick` spares, and how far its figures are from those of the full effort.

    python benchmarks/quick_compile.py [NAME…] [--repeat 1] [--out FILE.md]

Steps are those of ``plan_vs_xla.py``, by name.  Each is compiled with the compiler's own effort and
with its least, in turns.  Processor seconds are those of the whole command and all its threads,
which other jobs disturb less than the clock; behind a figure stands the ratio of the quick one to
the full one, the median over the repetitions.  Exit code 1 if a program could not be compiled.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from statistics import median

from plan_vs_xla import PAIRS, Pair, figures, report_of

NAMES = ("smollm2", "llama", "llama-gpu", "mixtral", "mixtral-dropless", "st-moe-l", "st-moe-32b")
HEAD = (
    "step", "machine", "processor s", "compiled in, s", "host memory, GB", "TFLOPs", "moved, GB",
    "temporaries, GB", "peak, GB",
)  # fmt: skip
SCALES = (1, 1, 1e9, 1e12, 1e9, 1e9, 1e9)
"""What figures are divided by, in the order of `HEAD`."""


def compiled(pair: Pair, quick: bool) -> tuple[float, ...]:
    """Compile a step, and return its figures in the order of `HEAD`.

    Raises:
      RuntimeError: it could not be compiled.
    """
    before = _processor_seconds()
    report = report_of([*pair.command, *(["--quick"] if quick else [])])
    spent = _processor_seconds() - before
    found = figures(report)[0]
    return (
        spent, report["seconds"]["compile"], report["host_peak_bytes"],
        *(found[kind] for kind in ("FLOPs", "collectives", "temporaries", "peak")),
    )  # fmt: skip


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row_of(name: str, repeat: int) -> str:
    """Compile the step `name` in turns, and return its row of the table."""
    pair = PAIRS[name]
    turns = [[compiled(pair, quick) for quick in (False, True)] for _ in range(repeat)]
    cells = [name, pair.machine]
    for column, scale in enumerate(SCALES):
        full, quick = (median(turn[i][column] for turn in turns) / scale for i in (0, 1))
        ratio = median(turn[1][column] / turn[0][column] for turn in turns)
        digits = 0 if column < 2 else 2
        cells.append(f"{full:.{digits}f} → {quick:.{digits}f} ({ratio:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"steps, of {', '.join(PAIRS)}")
    parser.add_argument("--repeat", type=int, default=1, help="turns of each")
    parser.add_argument("--out", type=Path, help="where the table goes, too")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in PAIRS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; steps: {', '.join(PAIRS)}")
    rows = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(rows), flush=True)
    failed = False
    for name in given.names or NAMES:
        try:
            rows.append(row_of(name, given.repeat))
            print(rows[-1], flush=True)
        except RuntimeError as error:
            failed = True
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    if given.out:
        given.out.write_text("\n".join(rows) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
