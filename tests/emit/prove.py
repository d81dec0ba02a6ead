"""``make proof-emit``: every source by every method, emitted and judged by torch.

    python -m tests.emit.prove --out FILE [--work DIR] [--pairs] [--sources …] [--methods …]

FILE has a line of JSON for each cell; a cell whose text is as it was, and was right, is not judged
again.  DIR keeps outputs of the reference, and gradients by XLA.  With ``--pairs`` the cells are
those of the proof table, without gradients: between equal experts that of a router is zero.  Of
several with one text, which differ in weights alone, one is judged.  ``make docs`` writes the table
of docs/proofs/emit.jsonl into docs/emit.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moecc.errors import MoeccError
from tests.emit.cells import MIXTURES, EmittedCell, cells, pairs, write_reference
from tests.parity.interpreters import interpreters

BOUNDS = {"float32": 1e-5, "float64": 1e-10}


def is_right(verdict: dict[str, Any]) -> bool:
    """Whether all errors of a verdict are within their bounds, and all tokens equal."""
    return "error" not in verdict and all(
        value if isinstance(value, bool) else value <= BOUNDS[name.partition(".")[0]]
        for name, value in verdict.items()
    )


class Judge:
    """A process of an interpreter without moecc, which judges one folder after the other."""

    def __init__(self, python: str):
        # Folders of one name would be one module in a cache that several processes write.
        self._modules = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(Path(__file__).parent / "judge.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Bytecode is told apart by second and size, and files are written faster than that.
            env={
                **os.environ,
                "PYTHONPATH": "",
                "HF_MODULES_CACHE": self._modules.name,
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        self.name = f"transformers {self._answer()['transformers']}"

    def ask(self, folder: Path, reference: Path):
        """Begin to judge a folder."""
        self._process.stdin.write(f"{folder}\t{reference}\n")
        self._process.stdin.flush()

    def verdict(self) -> dict[str, Any]:
        """Return the verdict about the folder that was asked for."""
        verdict = self._answer()
        return {n: float(f"{x:.2g}") if isinstance(x, float) else x for n, x in verdict.items()} | {
            "right": is_right(verdict)
        }

    def _answer(self) -> dict[str, Any]:
        line = next(line for line in self._process.stdout if line.startswith("{"))
        return json.loads(line)

    def close(self):
        """End the process."""
        self._process.communicate()
        self._modules.cleanup()


Rows = dict[tuple[str, str], dict[str, Any]]
"""What is known of each source and method."""


def prove(wanted: Iterable[EmittedCell], work: Path, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield a row for each cell: why it is refused, or the verdict of every interpreter.

    Args:
      wanted: the cells.
      work: a folder of references, by the digest of what they are computed of.
      rows: the rows of earlier runs.
    """
    judges = [Judge(python) for python in interpreters()]
    try:
        for cell in wanted:
            row = {"source": cell.source, "method": cell.method}
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "model"
                try:
                    cell.write(folder)
                except MoeccError as error:
                    yield row | {"refused": " ".join(error.problems[0].message.split())}
                    continue
                text = (folder / "modeling_st_moe.py").read_bytes()
                row |= {"text": digest(text), "lines": text.count(b"\n")}
                row["date"] = datetime.date.today().isoformat()
                earlier = rows.get((cell.source, cell.method), {})
                if earlier.get("text") == row["text"] and is_proved(earlier, judges):
                    yield earlier
                    continue
                if cell.passes is not None and (twin := twin_of(row, rows, judges)):
                    yield row | {"as": twin["method"]}
                    continue
                gradients = cell.passes is None
                files = ("config.json", "model.safetensors")
                name = digest(b"".join((folder / file).read_bytes() for file in files))
                reference = work / f"{name}{'-gradients' * gradients}.npz"
                if not reference.is_file():
                    write_reference(folder, reference, gradients=gradients)
                if gradients:
                    with np.load(reference) as arrays:
                        row["condition"] = float(f"{arrays['condition']:.2g}")
                for judge in judges:
                    judge.ask(folder, reference)
                yield row | {j.name: j.verdict() for j in judges}
    finally:
        for judge in judges:
            judge.close()


def twin_of(row: dict[str, Any], rows: Rows, judges: Sequence[Judge]) -> dict[str, Any] | None:
    """Return a judged row of the same source and text: the same program with other weights."""
    key = row["source"], row["text"]
    return next(
        (r for r in rows.values() if (r["source"], r.get("text")) == key and "as" not in r
         and is_proved(r, judges)), None,
    )  # fmt: skip


def digest(data: bytes) -> str:
    """Return a short name of some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def is_proved(row: dict[str, Any], judges: Iterable[Judge] = ()) -> bool:
    """Whether every interpreter finds a row right, those of `judges` among them."""
    verdicts = {k: v["right"] for k, v in row.items() if k.startswith("transformers")}
    is_judged = "as" in row or {j.name for j in judges} <= verdicts.keys()
    return is_judged and ("as" in row or bool(verdicts)) and all(verdicts.values())


RECORD = Path("docs/proofs/emit.jsonl")


def render() -> str:
    """Return the record as Markdown: for each method the cells that are right, and the errors."""
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    written = [row for row in rows if "refused" not in row]
    judges = sorted({n for row in written for n in row if n.startswith("transformers")})
    lines = [
        f"On {max(row['date'] for row in written)}, {' and '.join(judges)}, on a CPU: of "
        f"{len(rows)} cells {sum(map(is_proved, written))} are right, and "
        f"{len(rows) - len(written)} are rejected.\n",
        "| method | right | outputs | auxiliary loss | gradients | tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(map(_label, written)):
        chosen = [row for row in written if _label(row) == method]
        verdicts = [row[judge] for row in chosen for judge in judges]
        errors = [
            " · ".join(f"{max(v):.1e}" for kind in BOUNDS
                       if (v := [x[key] for x in verdicts if (key := f"{kind}.{name}") in x]))
            for name in ("output", "aux_loss", "gradient")
        ]  # fmt: skip
        tokens = sum("moecc" in row[judges[0]] for row in chosen)
        right = f"{sum(map(is_proved, chosen))} of {len(chosen)}"
        lines.append(f"| {' | '.join([method, right, *errors, str(tokens or '')])} |")
    reasons = {}
    for row in rows:
        if "refused" in row:
            reason = row["refused"].removeprefix("layers.0.")
            reasons.setdefault(reason, []).append((row["method"], row["source"]))
    lines.append("")
    for reason, cells_of_reason in reasons.items():
        methods, sources = (sorted(set(x)) for x in zip(*cells_of_reason, strict=True))
        words = (
            ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} {kind}"
            for names, kind in ((methods, "methods"), (sources, "sources"))
        )
        lines.append(f"- {next(words)}: {reason} ({next(words)})")
    return "\n".join(lines)


MOST_NAMES = 8
"""How many names of methods or sources stand in a line."""


def _label(row: dict[str, Any]) -> str:
    return "mixtures as they are" if row["source"] in MIXTURES else str(row["method"])


def main():
    """Judge the cells that the file has not."""
    import tests.conftest  # noqa: F401 (XLA compiles as in tests: in a third of the time)

    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[])
    options = parser.parse_args()
    if not interpreters():
        parser.error("MOECC_PARITY_PYTHON names no interpreter that has torch and transformers")
    lines = options.out.read_text().splitlines() if options.out.is_file() else []
    rows = {(row["source"], row["method"]): row for row in map(json.loads, lines)}
    wanted = [
        cell
        for cell in (pairs() if options.pairs else cells())
        if cell.source in (options.sources or [cell.source])
        and cell.method in (options.methods or [cell.method])
    ]
    wanted.sort(key=lambda cell: (cell.source, cell.method) in rows)  # new ones first
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for row in prove(wanted, work, rows):
            rows[row["source"], row["method"]] = row
            options.out.write_text("".join(json.dumps(r) + "\n" for r in rows.values()))
            if "refused" not in row and not is_proved(row):
                print(json.dumps(row), file=sys.stderr, flush=True)
    written = [row for row in rows.values() if "refused" not in row]
    right, twins = sum(map(is_proved, written)), sum("as" in row for row in written)
    refused = len(rows) - len(written)
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(u.ru_utime + u.ru_stime for u in usages) / 60
    print(f"{right} of {len(written)} right ({twins} by their text), {refused} refused")
    print(f"{minutes:.0f} minutes of processor time")


if __name__ == "__main__":
    main()
