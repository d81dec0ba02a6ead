"""The shell sessions of the pages are run, and print what the pages say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT, Block, blocks_of

SESSIONS = [ROOT / "README.md", ROOT / "docs" / "tour.md"]


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Return the commands of a session, each with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.startswith("> "):
            command, printed = found.pop()
            found.append((f"{command}\n{line[2:]}", printed))
        else:
            found[-1][1].append(line.rstrip())
    return found


def fits(expected: list[str], found: list[str]) -> bool:
    """Whether lines are as expected, where ``…`` stands for anything, alone for any lines."""
    text = "\n".join(["", *expected, ""])
    pattern = "".join(
        r"(?:.*\n)*?" if part == "…\n" else "[^\n]*" if part == "…" else re.escape(part)
        for part in re.split(r"((?<=\n)…\n|…)", text)
    )
    return re.fullmatch(pattern, "\n".join(["", *found, ""])) is not None


def test_what_fits() -> None:
    assert fits(["a … c"], ["a b c"])
    assert fits(["a", "…", "c"], ["a", "b", "b", "c"])
    assert not fits(["a … c"], ["a b d"])
    assert not fits(["a"], ["a", "b"])
    assert fits([], [])
    assert not fits([], ["a"])


@pytest.mark.parametrize("page", SESSIONS, ids=lambda p: p.name)
def test_sessions(page: Path, tmp_path: Path) -> None:
    for name in ("tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
    }
    for block in blocks_of(page):
        if block.info != "console":
            continue
        for command, expected in commands(block):
            done = subprocess.run(
                ["/bin/sh", "-c", f"{command}\n"],
                cwd=tmp_path, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            found = [line.rstrip() for line in done.stdout.splitlines()]
            shown = "\n".join([f"{block}: $ {command}", *found])
            assert fits(expected, found), shown
