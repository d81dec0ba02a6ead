"""Runs every cell, and writes docs/proof-table.md: ``make proof-table``, from the root."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from tests.proof.cells import (
    DENSE,
    METHODS,
    MIXTURES,
    OVER_MIXTURES,
    TARGETS,
    Cell,
    Result,
    cells,
    run,
)  # fmt: skip

PAGE = Path("docs/proof-table.md")
HEAD = """# Sources, targets, methods

Written by `make proof-table`, which runs every cell on a golden checkpoint: it converts, reads the
result back, and compares outputs in float64. `=`: those of the source, within 10⁻⁶ (weights are
stored as float32). `≈`: another function, as the pass announces; the file computes what the graph
does, within 10⁻⁶. `— n`: rejected before a byte is written, for the reason with that number.
`tests/proof/test_cells.py` runs sixty cells each time, twenty of each sign.

The options of a method are those that lead to the family (`inspect` shows them): `glm4_moe` has
sigmoid gates and a shared expert, `phimoe` SparseMixer, which is exact under a router of zeros
alone. `BTX` mixes the source with a model whose weights all differ, `LoRA` with the source under an
adapter of rank 2 on every matrix. `all slices` is one copy in four slices, all of them chosen; the
splits store each neuron once, too, and a token gets some of the four, which for `activation` follow
from statistics. `padded` are virtual groups of a width that is a multiple of 7. What a bias keeps
from being chosen needs a family with such a bias.
The golden checkpoints have random weights: what `≈` costs a trained model is not shown here.
"""


def main() -> None:
    """Run all cells, and write the page."""
    done: dict[Cell, Result] = {}
    todo = cells()
    for number, cell in enumerate(todo, 1):
        done[cell] = run(cell)
        if number % 100 == 0:
            print(f"{number} of {len(todo)}", file=sys.stderr)
    reasons: dict[str, int] = {}
    parts = [HEAD, *_parts(done, reasons), "### Reasons", ""]
    for reason, number in reasons.items():
        parts += textwrap.wrap(
            f"{number}. {reason}", 100, subsequent_indent="   ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    counts = {kind: sum(r.kind == kind for r in done.values()) for kind in "=≈—"}
    worst = max(r.error for r in done.values())
    sources, methods = (*DENSE, *MIXTURES), {*METHODS, *OVER_MIXTURES}
    said = (
        f"On {date.today()}: {len(sources)} sources, {len(TARGETS)} targets, {len(methods)} "
        f"methods; {len(done):,} cells: {counts['=']:,} equal, {counts['≈']:,} announced, "
        f"{counts['—']:,} rejected. The largest error is {worst:.1e} of the largest output."
    )
    parts.insert(1, textwrap.fill(said, 100) + "\n")
    PAGE.write_text("\n".join(parts) + "\n")


def _parts(done: dict[Cell, Result], reasons: dict[str, int]) -> Iterable[str]:
    for target in TARGETS:
        mine = [c for c in done if c.target == target and c.source not in MIXTURES]
        yield from _table(f"To {target}", mine, tuple(METHODS), done, reasons)
    over = [c for c in done if c.source in MIXTURES]
    yield from _table("Over mixtures", over, tuple(OVER_MIXTURES), done, reasons)


def _table(
    title: str,
    shown: Sequence[Cell],
    methods: Sequence[str],
    done: dict[Cell, Result],
    reasons: dict[str, int],
) -> Iterable[str]:
    yield f"### {title}\n"
    yield f"| | {' | '.join(methods)} |"
    yield "|---" * (len(methods) + 1) + "|"
    for source in dict.fromkeys(cell.source for cell in shown):
        row = {c.method: _sign(done[c], reasons) for c in shown if c.source == source}
        family = next(c.family for c in shown if c.source == source)
        yield f"| `{family}` | {' | '.join(row[m] for m in methods)} |"
    yield ""


def _sign(result: Result, reasons: dict[str, int]) -> str:
    if result.kind != "—":
        return result.kind
    return f"— {reasons.setdefault(result.reason, len(reasons) + 1)}"


if __name__ == "__main__":
    main()
