"""``make proof-jobs``: the five jobs of docs/jobs.md from a fresh clone, with what each takes.

    python -m tests.proof.jobs [--work FOLDER] [--out FILE]

The repository is cloned, installed by ``make install``, and every command of the page is run in the
clone, and compared with what the page says it prints.  Prints a JSON object: by job the minutes,
the commands, and the lines that a reader writes by hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.docs.pages import ROOT, Block, blocks_of
from tests.docs.sessions import AS, commands, environment, run_block
from tests.reports import about, deliver, work_folder

PAGE = Path("docs") / "jobs.md"
MOST_LINES = 30
"""Of a training loop by the API."""


def clone(work: Path) -> tuple[Path, float]:
    """Return a clone of the repository with everything installed, and the minutes of that."""
    start = time.monotonic()
    made = work / "moecc"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(made)], check=True)
    subprocess.run(["make", "--silent", "install"], cwd=made, check=True, stdout=sys.stderr)
    return made, (time.monotonic() - start) / 60


def jobs(page: Path) -> dict[str, list[Block]]:
    """Return the blocks of a page by the heading that they stand under."""
    text = page.read_text("utf-8").splitlines()
    found = {}
    for block in blocks_of(page):
        above = [line[3:] for line in text[: block.line] if re.match("## ", line)]
        found.setdefault(above[-1] if above else "before", []).append(block)
    return found


def by_hand(blocks: list[Block]) -> Iterator[tuple[str, int]]:
    """Yield the files that a reader writes, with their lines that are not empty."""
    for block in blocks:
        if AS in block.info:
            lines = sum(1 for line in block.text.splitlines() if line.strip())
            yield block.info.partition(AS)[2], lines


def prove(made: Path) -> dict[str, Any]:
    """Run the jobs in a clone, and return what each took."""
    environ = environment(made / ".venv" / "bin")
    found = {}
    for job, blocks in jobs(made / PAGE).items():
        print(f"## {job}", file=sys.stderr)
        start = time.monotonic()
        for block in blocks:
            run_block(block, made, environ)
        typed = [line for b in blocks if b.info == "console" for line, _ in commands(b)]
        found[job] = {
            "minutes": round((time.monotonic() - start) / 60, 2),
            "commands": len(typed),
            "lines_by_hand": dict(by_hand(blocks)),
            "training_commands": sum(line.startswith("moecc train recipe:") for line in typed),
        }
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """Return what is more than it may be."""
    lines = {name: n for job in found.values() for name, n in job["lines_by_hand"].items()}
    training = found["One who trains on"]["training_commands"]
    checks = {
        f"training by the API has more than {MOST_LINES} lines": lines["out/train_on.py"]
        <= MOST_LINES,
        "training by the command is more than one command": training == 1,
    }
    return [text for text, holds in checks.items() if not holds]


def main() -> int:
    """Run, print, and return 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="the folder to clone into, which is kept")
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    asked = parser.parse_args()
    with work_folder(asked.work, "moecc-jobs-") as work:
        made, minutes = clone(work)
        found = {**about(), "install_minutes": round(minutes, 2), "jobs": prove(made)}
    return deliver({**found, "failures": failures(found["jobs"])}, asked.out)


if __name__ == "__main__":
    sys.exit(main())
