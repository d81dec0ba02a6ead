"""Run every cell into docs/proofs/table.json, and write docs/proof-table.md from it.

``make proof-table`` runs all cells; ``python -m tests.proof.make_table --sources …`` those of some,
``--page`` writes the page alone, and ``--programs FILE`` first takes what torch says of the
programs, by ``python -m tests.emit.prove --pairs``.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tests.emit.prove import is_proved
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

PROGRAMS = """## As a program in PyTorch

`--to st_moe --emit torch` writes every graph as a file that transformers loads. `python -m
tests.emit.prove --pairs` lets torch compute each, within 10⁻⁵ of moecc's reference in float32 and
10⁻¹⁰ in float64, those too that the families above reject. Pairs of one source with the same text,
which differ in weights alone, are judged once.
"""

RECORD, PAGE = Path("docs/proofs/table.json"), Path("docs/proof-table.md")
PROOFS = Path("docs/proofs/equal.json")
HEAD = """# Sources, targets, methods

`make proof-table` converts a golden checkpoint in each cell, reads the result back, and compares
outputs in float64 with those of the source, within 10⁻⁶ (weights are stored as float32).

| sign | the result |
|---|---|
| `∎` | proved: the same function from the source's file to the written tensors, for all inputs |
| `=` | sampled: equal outputs for drawn inputs |
| `ε` | equal outputs for drawn inputs; the same function up to a bound, which the promise states |
| `≈` | approximate: another function, as announced; the file computes what the graph does |

An empty cell is rejected before a byte is written; [proofs/table.json](proofs/table.json) has the
reasons, which `inspect` prints for a model. [proofs/equal.json](proofs/equal.json) has the proofs
and the bounds. Rows without a result are left out. `tests/proof/test_cells.py` runs
eighteen cells, six of each kind.

The options of a method are those that lead to the family: `glm4_moe` has sigmoid gates and a shared
expert, `phimoe` SparseMixer, which is exact only under a router of zeros. `BTX` mixes the source
with a model of other weights, `LoRA` with the source under an adapter of rank 2. `all slices` is
one copy in four slices, all of them chosen; each split stores every neuron once, and a token gets
some of the four slices. `padded` are virtual groups whose width is no multiple of 7. The golden
checkpoints have random weights, so the table does not show what `≈` costs a trained model.
"""

Cells = dict[str, dict[str, dict[str, str]]]
"""By source, target and method: the sign of a result, and the reason of a rejection."""


def main():
    """Run cells unless ``--page`` or ``--programs`` is given, and write the page."""
    record = json.loads(RECORD.read_text())
    match sys.argv[1:]:
        case ["--page"]:
            pass
        case ["--programs", file]:
            record["programs"] = _programs(record["cells"], Path(file))
        case ["--sources", *sources]:
            largest = record["largest_error"]
            record |= _run(sources, record["cells"])
            record["largest_error"] = max(largest, record["largest_error"])
        case _:
            record |= _run((*DENSE, *MIXTURES), {})
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(record))


def _programs(results: Cells, file: Path) -> dict[str, object]:
    """Return the signs of the pairs that torch finds right, and how many it judged itself."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = [row for row in rows if "refused" not in row and is_proved(row)]
    signs = {row["source"]: {} for row in rows}
    for row in right:
        by_target = results[row["source"]]
        cells = (
            by_target.get("st_moe", {}) if row["source"] in DENSE else ChainMap(*by_target.values())
        )
        sign = cells[row["method"]][0].replace("—", "·")
        signs[row["source"]][row["method"]] = sign
    versions = sorted({name for row in rows for name in row if name.startswith("transformers")})
    judged = sum("as" not in row for row in right)
    return {"date": str(date.today()), "by": versions, "judged": judged, "right": len(right),
            "refused": sum("refused" in row for row in rows), "cells": signs}  # fmt: skip


def _run(sources: Sequence[str], earlier: Cells) -> dict[str, object]:
    results = {s: rows for s, rows in earlier.items() if s not in sources}
    largest_error = 0.0
    for number, cell in enumerate((cell for cell in cells() if cell.source in sources), 1):
        result = run(cell)
        text = result.kind if result.kind != "—" else f"— {result.reason}"
        results.setdefault(cell.source, {}).setdefault(cell.target, {})[cell.method] = text
        largest_error = max(largest_error, result.error)
        if number % 100 == 0:
            print(f"{number} cells", file=sys.stderr)
    return {"date": str(date.today()), "largest_error": largest_error, "cells": results}


def page(record: Mapping[str, Any]) -> str:
    """Return the page: a table a target, of the sources that reach it."""
    results = _with_proofs(record["cells"])
    signs = Counter(
        text[0] for rows in results.values() for row in rows.values() for text in row.values()
    )
    summary = (
        f"On {record['date']}: {signs.total():,} cells, {signs['∎']:,} proved, {signs['=']:,} "
        f"sampled, {signs['ε']:,} up to a bound, {signs['≈']:,} approximate, {signs['—']:,} "
        f"rejected. The largest error is {record['largest_error']:.1e} of the largest output."
    )
    lines = [HEAD, textwrap.fill(summary, 100), ""]
    dense = [(f"`{t}`", s, results[s][t]) for t in TARGETS for s in DENSE]
    mixtures = [("", s, dict(ChainMap(*results[s].values()))) for s in MIXTURES]
    lines += ["## Dense models", "", *_table(dense, tuple(METHODS))]
    lines += ["## Mixtures", "", *_table(mixtures, tuple(OVER_MIXTURES))]
    programs = record["programs"]
    of_sources = {**dict.fromkeys(DENSE, METHODS), **dict.fromkeys(MIXTURES, OVER_MIXTURES)}
    pairs = [(source, m) for source, methods in of_sources.items() for m in methods]
    judged = [(source, method) for source, method in pairs if source in programs["cells"]]
    rejected = ", ".join(
        f"{method} of `{family_of(source)}`"
        for source, method in judged
        if method not in programs["cells"][source]
    )
    waiting = ", ".join(
        f"`{family_of(source)}`" for source in of_sources if source not in programs["cells"]
    )
    summary = (
        f"On {programs['date']}, {', '.join(programs['by'])}: {programs['right']} of "
        f"{len(judged)} pairs right, {programs['judged']} of them judged themselves; rejected: "
        f"{rejected}.{' Not judged yet: ' + waiting + '.' if waiting else ''}"
    )
    lines += [PROGRAMS, textwrap.fill(summary, 100), ""]
    return "\n".join(lines)


def _with_proofs(results: Cells) -> Cells:
    """Return the cells with a sign of their own where the proofs say more than equal outputs."""
    proofs = json.loads(PROOFS.read_text("utf-8"))

    def sign(text, *cell):
        key = " | ".join(("cell", *cell))
        if text != "=":
            return text
        return "∎" if key in proofs["rows"] else "ε" if key in proofs["up_to"] else "="

    return {
        source: {
            target: {m: sign(text, source, target, m) for m, text in row.items()}
            for target, row in rows.items()
        }
        for source, rows in results.items()
    }


def _table(
    rows: Iterable[tuple[str, str, Mapping[str, str]]], methods: Sequence[str]
) -> Iterable[str]:
    """Yield a table of targets, sources and signs; sources with the same signs share a row."""
    groups = {}
    for target, source, row in rows:
        signs = [row[m][0] for m in methods]
        if any(sign in "∎=ε≈" for sign in signs):
            key = (target, *(sign.strip("— ") for sign in signs))
            groups.setdefault(key, []).append(f"`{family_of(source)}`")
    heads = ["to" if target else "" for target, *_ in groups][:1]
    yield f"| {' | '.join(filter(None, [*heads, 'from', *methods]))} |"
    yield "|---" * (len(methods) + 1 + bool(heads[0])) + "|"
    for (target, *signs), sources in groups.items():
        yield f"| {' | '.join([*filter(None, [target]), ', '.join(sources), *signs])} |"
    yield ""


if __name__ == "__main__":
    main()
