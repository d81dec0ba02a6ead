"""``make proof-emit``: every source by every method, emitted and judged by torch; dated JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecc.errors import MoeccError
from tests.emit.cells import EmittedCell, cells, write_reference
from tests.parity.interpreters import interpreters

BOUNDS = {"float32": 1e-5, "float64": 1e-10}

GRADIENTS = ("llama_gqa", "gpt2_square", "t5_gated_untied", "bert_square", "vit_square")
"""The sources whose gradients are compared by default: a decoder with gates, and one of each."""


def is_right(verdict: dict[str, Any]) -> bool:
    """Whether all numbers of a verdict are within their bounds."""
    if "error" in verdict:
        return False
    for name, value in verdict.items():
        kind, _, what = name.partition(".")
        if value is False:
            return False
        if what and not value <= BOUNDS[kind]:
            return False
    return True


def ask(python: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what an interpreter without moecc says: its versions, then a verdict a folder."""
    done = subprocess.run(
        [python, "-W", "ignore", str(Path(__file__).parent / "judge.py")],
        input="".join(f"{folder}\n" for folder in folders),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def prove(wanted: Sequence[EmittedCell], *, gradients: Sequence[str] = ()) -> dict[str, Any]:
    """Write all cells, let every interpreter judge them, and return the report.

    Args:
      wanted: the cells.
      gradients: the sources whose gradients are compared, which XLA compiles.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for cell in wanted:
            folder = Path(temporary) / cell.name
            row: dict[str, Any] = {"source": cell.source, "method": cell.method}
            rows.append(row)
            try:
                cell.write(folder)
                write_reference(folder, gradients=cell.source in gradients)
            except MoeccError as error:
                row["refused"] = " ".join(str(error).split())[:300]
                continue
            row["lines"] = len((folder / "modeling_st_moe.py").read_text().splitlines())
            folders.append((row, folder))
        versions = []
        for python in interpreters():
            version, *verdicts = ask(python, [folder for _, folder in folders])
            versions.append(version)
            for (row, _), verdict in zip(folders, verdicts, strict=True):
                verdict["right"] = is_right(verdict)
                row[f"transformers {version['transformers']}"] = verdict
    return summarised(versions, rows)


def summarised(versions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of cells, and how many of them are right."""
    judged = [row for row in rows if "refused" not in row]
    wrong = [
        row
        for row in judged
        if not all(v["right"] for k, v in row.items() if k.startswith("transformers"))
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "bounds": BOUNDS,
        "right": len(judged) - len(wrong),
        "judged": len(judged),
        "refused": len(rows) - len(judged),
        "cells": rows,
    }


def joined(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the cells of an earlier one that it has not."""
    if not path.is_file():
        return report
    earlier = json.loads(path.read_text())
    rows = {(row["source"], row["method"]): row for row in earlier["cells"]}
    for row in report["cells"]:
        key = row["source"], row["method"]
        rows[key] = {**rows.get(key, {}), **row}
    versions = [*earlier["versions"], *report["versions"]]
    unique = [v for i, v in enumerate(versions) if v not in versions[:i]]
    return summarised(unique, list(rows.values()))


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--gradients", nargs="*", default=GRADIENTS)
    options = parser.parse_args()
    wanted = [
        cell
        for cell in cells()
        if cell.source in (options.sources or [cell.source])
        and cell.method in (options.methods or [cell.method])
    ]
    report = prove(wanted, gradients=options.gradients)
    if options.sources or options.methods:  # a part: the other cells stay as they were
        report = joined(options.out, report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print({k: report[k] for k in ("right", "judged", "refused")}, file=sys.stderr)


if __name__ == "__main__":
    main()
