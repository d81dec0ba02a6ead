"""Shell sessions of the pages: the commands, what they print, and whether it is what is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .pages import Block

AS = " as "
"""Between the language of a block and the file that a reader writes it into."""


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Return the commands of a session, each with the lines that it prints."""
    found = []
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


def environment(bin_folder: Path | None = None) -> dict[str, str]:
    """Return the environment of a session: the commands of this interpreter first, no colours.

    The devices that tests force are not those of a reader.
    """
    first = bin_folder or Path(sys.executable).parent
    path = f"{first}{os.pathsep}{os.environ['PATH']}"
    kept = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    return {**kept, "PATH": path, "NO_COLOR": "1", "MOECC_PROGRESS": "off"}


def run_block(block: Block, folder: Path, environ: Mapping[str, str]):
    """Run the commands of a session in `folder`; a block with a file is written there.

    Raises:
      AssertionError: a command prints something else than the page says.
    """
    if AS in block.info:
        path = folder / block.info.partition(AS)[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, "utf-8")
    if block.info != "console":
        return
    for command, expected in commands(block):
        done = subprocess.run(
            ["/bin/sh", "-c", f"{command}\n"],
            cwd=folder, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        found = [line.rstrip() for line in done.stdout.splitlines()]
        shown = "\n".join([f"{block}: $ {command}", *found])
        assert fits(expected, found), shown
        # Where nothing of an error is written, none is hidden behind dots either.
        is_error = any(line.startswith("error:") for line in expected)
        assert bool(done.returncode) <= is_error, f"{shown}\nexit code {done.returncode}"
