"""The record of the independent checker: proofs accepted, faults and mutants told apart.

    python -m tests.checker.record [--sample N] [--faults N] [--seconds S] [--jobs N] [--out FILE]

Three parts: the checker judges the proof of every run and cell of the matrix that is proved
(tests/oracle/matrix.py), and of steps of generation; it judges proofs with a fault; and mutants of
the checker judge uses of its lemmas and a few logs. Each judgement is a line in the work folder, so
that a run that was stopped, or given a number of seconds, goes on where it ended. Writes a dated
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import moecc_check

from moecc.version import __version__

from ..oracle import matrix  # noqa: TID252
from .corruptions import Proof, corrupted, is_accepted, proof_of
from .mutants import EQUIVALENT, FOLDER, Mutant, is_alive, of_code, of_table

CORRUPTED = (
    ("run", "llama_gqa", "upcycle{experts=4}"),
    ("run", "llama_gqa", "upcycle{experts=4 granularity=2 top-k=4 router-std=1}"),
    ("run", "qwen2_square", "roll-layers"),
    ("run", "mixtral_gqa", "grow{times=2}"),
    ("run", "bert_square", "upcycle{experts=4 granularity=4 top-k=4 router-std=1}"),
    ("cell", "bert_square", "st_moe", "grow"),
    ("cell", "llama_gqa", "mixtral", "padded"),
    ("run", "llama_gqa", "annotate-sharding{mesh=data:2,model:2 rules=tensor-parallel,"
     "sequence-parallel,zero},lower-collectives,roll-layers"),
    ("run", "mixtral_gqa", "specialize{groups=4},add-losses ; annotate-sharding{mesh=far:2,near:2 "
     "rules=expert-hierarchical},expert-parallel{via=hierarchical},lower-collectives"),
    ("part", "mixtral_gqa", ""),
    ("step", "mixtral_gqa", ""),
)  # fmt: skip
"""Jobs of the matrix whose proofs are corrupted, in turn."""


def jobs_of(sample: int | None) -> list[tuple[str, ...]]:
    """Return the jobs of the matrix, or some, and a step of each model and of a mixture of it."""
    pipelines = ("", "upcycle{experts=4 router-std=1}")
    steps = [("step", name, pipeline) for name in matrix.golden_names() for pipeline in pipelines]
    return [*matrix.jobs_of(sample), *steps[:sample]]


def judge_proof(job: tuple[str, ...]) -> list[Any]:
    """Return what the checker says of the proof of a run or a cell."""
    kind, *words = job
    started = time.process_time()
    try:
        proof = proof_of(kind, *words)
    except moecc_check.Rejected as error:
        return ["rejected", 0, round(time.process_time() - started, 2), str(error)[:200]]
    except Exception as error:
        return ["crashed", 0, 0, repr(error)[:200]]
    if proof is None:
        return ["not proved", 0, 0, ""]
    steps = sum(len(part["steps"]) for part in (proof[0], proof[0].get("devices", {"steps": []})))
    verdict = "accepted" if is_accepted(moecc_check, proof) else "rejected"
    return [verdict, steps, round(time.process_time() - started, 2), ""]


@cache
def _proof(job: tuple[str, ...]) -> Proof:
    proof = proof_of(*job)
    assert proof is not None, job
    return proof


def judge_fault(number: int) -> list[Any]:
    """Return the kind of a fault, and whether the checker accepts the log that has it."""
    proof = _proof(CORRUPTED[number % len(CORRUPTED)])
    kind, wrong = corrupted(proof, random.Random(number))
    return [kind, is_accepted(moecc_check, wrong)]


@cache
def mutants() -> dict[str, Mutant]:
    """Return the mutants of the checker, by what was changed."""
    named: dict[str, Mutant] = {}
    for mutant in (*of_table(), *of_code()):
        change = mutant.change
        while change in named:
            change += ", again"
        named[change] = mutant
    return named


def judge_mutant(change: str) -> list[Any]:
    """Return whether no test tells a mutant from the checker."""
    return [is_alive(mutants()[change])]


class Judgements:
    """Lines of a file: keys with what was judged.

    Attributes:
      file: of the lines.
      rows: by key.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, dict[Any, list[Any]]()
        if file.exists():
            for line in file.read_text("utf-8").splitlines():
                key, row = json.loads(line)
                self.rows[tuple(key) if isinstance(key, list) else key] = row

    def complete(
        self,
        pool: ProcessPoolExecutor,
        judge: Callable[[Any], list[Any]],
        keys: Iterable[Any],
        until: float,
    ) -> None:
        """Judge what is missing, in order, until a time."""
        wanted = [k for k in keys if k not in self.rows]
        batch = 64 * (os.cpu_count() or 1)  # cores wait for the slowest of each
        with self.file.open("a", encoding="utf-8") as lines:
            for at in range(0, len(wanted), batch):
                if time.time() > until:
                    return
                part = wanted[at : at + batch]
                for key, row in zip(part, pool.map(judge, part), strict=True):
                    self.rows[key] = row
                    print(json.dumps([key, row]), file=lines, flush=True)


def main() -> None:
    """Judge what is missing, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m tests.checker.record", description=__doc__)
    parser.add_argument("--sample", type=int, help="number of runs and of cells (default: all)")
    parser.add_argument("--faults", type=int, default=1000, help="number of corrupted proofs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--work", type=Path, default=matrix.ROOT / "build" / "checker")
    parser.add_argument("--out", type=Path, default=matrix.ROOT / "docs/proofs/checker.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    until = time.time() + asked.seconds
    names = ("proofs", "faults", "mutants")
    proofs, faults, changes = (Judgements(asked.work / f"{n}.jsonl") for n in names)
    jobs = jobs_of(asked.sample)
    random.Random(0).shuffle(jobs)  # what is judged first is a sample of all
    with ProcessPoolExecutor(asked.jobs) as pool:
        proofs.complete(pool, judge_proof, jobs, until)
        faults.complete(pool, judge_fault, range(asked.faults), until)
        changes.complete(pool, judge_mutant, mutants(), until)
    asked.out.write_text(json.dumps(summary(proofs, faults, changes), indent=1) + "\n", "utf-8")


def summary(proofs: Judgements, faults: Judgements, changes: Judgements) -> dict[str, Any]:
    """Return the record of what is judged."""
    kinds = Counter(kind for kind, _ in faults.rows.values())
    wrong = [[k, *row] for k, row in faults.rows.items() if row[1]]
    verdicts = Counter(row[0] for row in proofs.rows.values())
    steps = sum(row[1] for row in proofs.rows.values())
    alive = sorted(k for k, (is_one,) in changes.rows.items() if is_one and k not in EQUIVALENT)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "moecc": __version__,
        "lines": {
            file.name: len(file.read_text("utf-8").splitlines())
            for file in sorted(FOLDER.glob("moecc_check*.*"))
        },
        "proofs": {
            "jobs": len(jobs_of(None)),
            "judged": len(proofs.rows),
            "steps_of_generation": sum(
                k[0] == "step" and row[0] == "accepted" for k, row in proofs.rows.items()
            ),
            **dict(sorted(verdicts.items())),
            "steps": steps,
            "seconds": round(sum(row[2] for row in proofs.rows.values())),
        },
        "not_accepted": [
            [*k, *row] for k, row in proofs.rows.items() if row[0] in ("rejected", "crashed")
        ],
        "faults": dict(sorted(kinds.items())),
        "faults_accepted": wrong,
        "mutants": len(changes.rows),
        "mutants_alive": alive,
        "mutants_equivalent": {k: r for k, r in sorted(EQUIVALENT.items()) if k in changes.rows},
    }


if __name__ == "__main__":
    main()
