"""Put a file and its manifest in place, which are two renames, so that each state can be told.

The journal is renamed first: from then on what is at the destination may be new.  An old manifest
waits in the partial folder until the old file is replaced: never is a manifest beside a file that
it is not of.  `settle` finishes or undoes what was interrupted.
"""

from __future__ import annotations

import os
from pathlib import Path

from moecc.checkpoint.disk import disk
from moecc.checkpoint.durable import synchronise_folder
from moecc.checkpoint.files import os_problem
from moecc.checkpoint.gguf.storage import FILE_NAME
from moecc.checkpoint.journal import COMMIT_NAME, JOURNAL_NAME
from moecc.checkpoint.leftovers import partial_of
from moecc.checkpoint.manifest import weight_file_record
from moecc.checkpoint.records import MANIFEST_NAME, manifest_beside, read_manifest
from moecc.errors import CheckError, InputError

_OLD_MANIFEST = "old_manifest.json"


def commit_file(file: Path) -> None:
    """Put what is complete in the partial folder of `file` in its place.

    Raises:
      MachineError: the system does not rename or synchronise.
    """
    partial, beside = partial_of(file), manifest_beside(file)
    try:
        if os.path.lexists(partial / JOURNAL_NAME):
            _replace(partial / JOURNAL_NAME, partial / COMMIT_NAME)
        synchronise_folder(partial)
        if os.path.lexists(beside):
            synchronise_folder(file.parent)  # it knows the partial folder before that has anything
            _replace(beside, partial / _OLD_MANIFEST)
            synchronise_folder(partial)
            synchronise_folder(file.parent)
        _replace(partial / FILE_NAME, file)
        synchronise_folder(file.parent)
        _replace(partial / MANIFEST_NAME, beside)
        synchronise_folder(file.parent)
    except BaseException:
        settle(file)
        raise


def settle(file: Path) -> Path | None:
    """Finish or undo a commit that was interrupted; return the manifest if it came in its place.

    Raises:
      MachineError: the system does not rename or synchronise.
    """
    partial, beside = partial_of(file), manifest_beside(file)
    if os.path.lexists(beside):
        return None
    if os.path.lexists(partial / FILE_NAME):
        waiting = partial / _OLD_MANIFEST
    elif was_committed(file):
        waiting = partial / MANIFEST_NAME
    else:
        return None
    if not waiting.is_file():
        return None
    _replace(waiting, beside)
    synchronise_folder(file.parent)
    return beside


def was_committed(file: Path) -> bool:
    """Return whether a writer was killed after it put a file in place.

    Raises:
      MachineError: the file cannot be read.
    """
    partial, beside = partial_of(file), manifest_beside(file)
    if not (partial / COMMIT_NAME).is_file() or os.path.lexists(partial / FILE_NAME):
        return False
    manifest = beside if os.path.lexists(beside) else partial / MANIFEST_NAME
    try:
        # A removal that was killed may look alike, beside a file that the manifest is not of.
        return file.is_file() and read_manifest(manifest).weights == {
            FILE_NAME: weight_file_record(file)
        }
    except (InputError, CheckError):
        return False


def _replace(made: Path, place: Path) -> None:
    try:
        disk().replace(made, place)
    except OSError as error:
        raise os_problem(error, place, "rename") from None
