"""The record of the independent checker: proofs accepted, faults and mutants rejected.

    python -m tests.checker.record [--cells N] [--faults N] [--seed N] [--out FILE]

Takes proofs of runs and cells of the matrix (tests/oracle/matrix.py) until the checker has judged
enough, corrupts them by seed, judges mutants of the checker by the uses of its lemmas, and writes a
dated JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import moecc_check

from ..oracle import matrix  # noqa: TID252
from .cases import failures
from .corruptions import Proof, corrupted, is_accepted, proof_of
from .mutants import SOURCE, loaded, mutants


def survivors() -> tuple[int, list[str]]:
    """Return how many mutants there are, and those that no use of a lemma tells apart."""
    alive, count = [], 0
    for change, source in mutants():
        count += 1
        try:
            is_alive = not failures(loaded(source))
        except Exception:  # a mutant that breaks is dead
            is_alive = False
        if is_alive:
            alive.append(change)
    return count, alive


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(prog="python -m tests.checker.record", description=__doc__)
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=matrix.ROOT / "docs/proofs/checker.json")
    asked = parser.parse_args()
    started, chance = time.process_time(), random.Random(asked.seed)
    jobs = matrix.jobs_of(asked.cells * 2, asked.seed)
    chance.shuffle(jobs)
    proofs: list[Proof] = []
    not_accepted: list[Any] = []
    for job in jobs:
        if len(proofs) + len(not_accepted) == asked.cells:
            break
        try:
            proof = proof_of(*job)
        except moecc_check.Rejected as error:
            not_accepted.append([*job, str(error)[:200]])
            continue
        if proof is not None:
            proofs.append(proof)
    kinds, accepted = Counter[str](), Counter[str]()
    smallest = sorted(proofs, key=lambda p: len(p[1]) + len(p[2]))[: max(1, len(proofs) // 2)]
    for _ in range(asked.faults):
        kind, proof = corrupted(chance.choice(smallest), chance)
        kinds[kind] += 1
        accepted[kind] += is_accepted(moecc_check, proof)
    count, alive = survivors()
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": asked.seed,
        "lines": len(SOURCE.read_text("utf-8").splitlines()),
        "proofs": len(proofs) + len(not_accepted),
        "accepted": len(proofs),
        "not_accepted": not_accepted,
        "faults": dict(sorted(kinds.items())),
        "faults_accepted": dict(sorted((+accepted).items())),
        "mutants": count,
        "mutants_alive": alive,
        "seconds": round(time.process_time() - started),
    }
    asked.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
