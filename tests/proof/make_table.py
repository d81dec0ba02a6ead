"""Run every cell into docs/proofs/table.json, and write docs/proof-table.md from it.

``make proof-table`` runs all cells; ``python -m tests.proof.make_table --page`` writes the page
alone.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from tests.proof.cells import (
    DENSE,
    METHODS,
    MIXTURES,
    OVER_MIXTURES,
    TARGETS,
    cells,
    family_of,
    run,
)

RECORD, PAGE = Path("docs/proofs/table.json"), Path("docs/proof-table.md")
HEAD = """# Sources, targets, methods

`make proof-table` converts a golden checkpoint in each cell, reads the result back, and compares
outputs in float64. `=`: equal to those of the source within 10⁻⁶ (weights are stored as float32).
`≈`: another function, as the pass announces; the file computes what the graph does, within 10⁻⁶.
`—`: rejected before a byte is written. [proofs/table.json](proofs/table.json) has every cell, with
the reason of each rejection; `inspect` prints the reasons for a model. Rows and tables without a
result are left out. `tests/proof/test_cells.py` runs sixty cells, twenty of each sign.

The options of a method are those that lead to the family: `glm4_moe` has sigmoid gates and a shared
expert, `phimoe` SparseMixer, which is exact only under a router of zeros. `BTX` mixes the source
with a model of other weights, `LoRA` with the source under an adapter of rank 2. `all slices` is
one copy in four slices, all of them chosen; each split stores every neuron once, and a token gets
some of the four slices. `padded` are virtual groups whose width is no multiple of 7. The golden
checkpoints have random weights, so the table does not show what `≈` costs a trained model.
"""

Cells = dict[str, dict[str, dict[str, str]]]
"""By source, target and method: the sign of a result, and the reason of a rejection."""


def main() -> None:
    """Run all cells unless ``--page`` is given, and write the page."""
    if "--page" not in sys.argv[1:]:
        RECORD.write_text(json.dumps(_run_all(), indent=1, ensure_ascii=False) + "\n")
    record = json.loads(RECORD.read_text())
    PAGE.write_text(page(record["cells"], record["date"], record["largest_error"]))


def _run_all() -> dict[str, object]:
    results: Cells = {}
    largest_error = 0.0
    for number, cell in enumerate(cells(), 1):
        result = run(cell)
        text = result.kind if result.kind != "—" else f"— {result.reason}"
        results.setdefault(cell.source, {}).setdefault(cell.target, {})[cell.method] = text
        largest_error = max(largest_error, result.error)
        if number % 100 == 0:
            print(f"{number} cells", file=sys.stderr)
    return {"date": str(date.today()), "largest_error": largest_error, "cells": results}


def page(results: Cells, day: str, largest_error: float) -> str:
    """Return the page: a table a target, of the sources that reach it."""
    signs = Counter(
        text[0] for rows in results.values() for row in rows.values() for text in row.values()
    )
    summary = (
        f"On {day}: {signs.total():,} cells, {signs['=']:,} equal, {signs['≈']:,} announced, "
        f"{signs['—']:,} rejected. The largest error is {largest_error:.1e} of the largest output."
    )
    lines = [HEAD, textwrap.fill(summary, 100), ""]
    for target in TARGETS:
        lines += _table(f"To {target}", {s: results[s][target] for s in DENSE}, tuple(METHODS))
    mixtures = {s: dict(ChainMap(*results[s].values())) for s in MIXTURES}
    return "\n".join([*lines, *_table("Over mixtures", mixtures, tuple(OVER_MIXTURES))])


def _table(
    title: str, rows: Mapping[str, Mapping[str, str]], methods: Sequence[str]
) -> Iterable[str]:
    reached = {s: row for s, row in rows.items() if any(text[0] != "—" for text in row.values())}
    if not reached:
        return
    yield f"## {title}\n"
    yield f"| | {' | '.join(methods)} |"
    yield "|---" * (len(methods) + 1) + "|"
    for source, row in reached.items():
        yield f"| `{family_of(source)}` | {' | '.join(row[m][0] for m in methods)} |"
    yield ""


if __name__ == "__main__":
    main()
