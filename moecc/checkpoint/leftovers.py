"""The folders beside an output while it is written, and what a killed conversion left of them.

``OUT`` is filled as ``.OUT.moecc-partial``; an old output that it replaces is ``.OUT.moecc-old``
between two renames and while it is deleted.  Both outlive a process that is killed.
"""

from __future__ import annotations

import os
from pathlib import Path

from moecc.checkpoint.journal import has_journal
from moecc.checkpoint.locks import BUSY, WAIT, is_locked
from moecc.checkpoint.problems import Problems
from moecc.checkpoint.removal import bytes_of


def partial_of(folder: Path) -> Path:
    """Return where the output `folder` is filled."""
    return folder.parent / f".{folder.name}.moecc-partial"


def replaced_of(folder: Path) -> Path:
    """Return where the old output `folder` is until the new one has its place."""
    return folder.parent / f".{folder.name}.moecc-old"


def check_leftovers(
    folder: Path, out: Path, force: bool, problems: Problems, *, resume: bool = False
) -> None:
    """Report a conversion that is running, and without `force` what a killed one left.

    With `resume` a partial output is no problem: it is continued.
    """
    partial, old = partial_of(folder), replaced_of(folder)
    if is_locked(partial):
        problems.add(BUSY, where=str(out), found=str(partial), hint=WAIT)
        return
    if force:
        return
    if os.path.lexists(partial) and not resume:
        goes_on = "--resume continues it, " if has_journal(partial) else ""
        problems.add(
            "an earlier conversion was killed and left its partial output behind", where=str(out),
            found=f"{partial}, {bytes_of(partial):,} bytes",
            hint=f"{goes_on}--force removes it, and so does moecc clean",
        )  # fmt: skip
    if os.path.lexists(old):
        back = f"; moecc clean {out} brings it back" if not os.path.lexists(folder) else ""
        problems.add(
            "an earlier conversion was killed while it replaced this output", where=str(out),
            found=f"the old output is {old}",
            hint=f"--force removes it once the new one is complete{back}",
        )  # fmt: skip


def leftover_bytes(folder: Path) -> int:
    """Return the disk space of what a killed conversion left, which is freed first."""
    return bytes_of(partial_of(folder))
