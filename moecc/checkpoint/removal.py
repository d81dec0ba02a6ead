"""Removal of files and folders that outputs made, links never followed."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from moecc.checkpoint.disk import disk
from moecc.errors import MachineError

_BLOCK_BYTES = 512


def remove(path: Path) -> None:
    """Remove a folder, or whatever has its name; errors are ignored, links are not followed."""
    # rmtree would open a pipe, and wait for someone to write to it.
    if os.path.islink(path) or not os.path.isdir(path):
        with suppress(OSError):
            disk().unlink(path)
        return
    try:
        disk().remove_tree(path)
    except BaseException:  # a second Ctrl-C: finish what the first one asked for
        disk().remove_tree(path)
        raise


def remove_rest(path: Path) -> None:
    """Remove what is of no use any more, now that the output is complete.

    Raises:
      MachineError: it cannot be removed.
    """
    remove(path)
    if os.path.lexists(path):
        raise MachineError(
            "the new output is complete, but this could not be deleted",
            where=str(path),
            hint="delete it yourself",
        )


def remove_but(folder: Path, kept: Collection[str]) -> None:
    """Remove whatever is in a folder but some files of it."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name not in kept or path.is_symlink() or not path.is_file():
            remove(path)


def bytes_of(path: Path) -> int:
    """Return the disk space that the files in a folder take."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * _BLOCK_BYTES
    return total
