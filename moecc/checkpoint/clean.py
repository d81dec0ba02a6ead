"""Remove what killed writers left beside an output, or finish what they had all but finished."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moecc.checkpoint.disk import disk
from moecc.checkpoint.durable import synchronise_folder
from moecc.checkpoint.filecommit import settle
from moecc.checkpoint.files import os_problem
from moecc.checkpoint.leftovers import partial_of, replaced_of
from moecc.checkpoint.locks import claimed
from moecc.checkpoint.removal import bytes_of, remove
from moecc.errors import MachineError

_LEFTOVER = re.compile(r"\.(.+)\.moecc-(?:partial|old)")


def clean(out: Path) -> list[str]:
    """Remove what a killed conversion left beside `out`, and return a line for each thing done.

    An old output that was being replaced is put back if the new one is not there, and a GGUF file
    that lacks only its manifest gets it.

    Args:
      out: the output, or what is left of it: ``.OUT.moecc-partial``.

    Raises:
      InputError: a conversion is writing the output.
      MachineError: something cannot be removed or put back.
    """
    folder = _output_of(Path(os.path.realpath(out)))
    partial, old = partial_of(folder), replaced_of(folder)
    if not os.path.lexists(partial) and not os.path.lexists(old):
        return []
    size = bytes_of(partial) if os.path.lexists(partial) else None
    done = []
    with claimed(partial, take_over=True, goes_on=lambda _: True):
        if manifest := settle(folder):
            done.append(f"put {manifest} in place")
        if os.path.lexists(old):
            done.append(_clean_old(old, folder))
        _remove(partial)
    if size is not None:
        done.append(f"removed {partial}, {size:,} bytes")
    return done


def _output_of(path: Path) -> Path:
    match = _LEFTOVER.fullmatch(path.name)
    return path.with_name(match[1]) if match else path


def _clean_old(old: Path, folder: Path) -> str:
    if os.path.lexists(folder):
        _remove(old)
        return f"removed {old}, which {folder} has replaced"
    try:
        disk().rename(old, folder)
    except OSError as error:
        raise os_problem(error, folder, "rename") from None
    synchronise_folder(folder.parent)
    return f"put {old} back as {folder}"


def _remove(path: Path) -> None:
    remove(path)
    if os.path.lexists(path):
        raise MachineError("it cannot be removed", where=str(path), hint="remove it yourself")
