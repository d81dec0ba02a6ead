"""An output that is one file with its manifest beside it, committed as a folder is.

``OUT.gguf`` is filled in a temporary folder ``.OUT.gguf.moecc-partial`` next to it, and renamed
from there when it is complete; then the manifest, ``OUT.gguf.moecc.json``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecc.checkpoint.durable import synchronise_folder
from moecc.checkpoint.files import os_problem
from moecc.checkpoint.gguf.storage import FILE_NAME
from moecc.checkpoint.leftovers import (
    check_leftovers,
    leftover_bytes,
    locked,
    partial_of,
    remove,
)
from moecc.checkpoint.outdir import check_apart, make_private, require_machine
from moecc.checkpoint.problems import Problems
from moecc.checkpoint.records import MANIFEST_NAME, manifest_beside
from moecc.errors import InputError


def check_output_file(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
) -> Path:
    """Check whether a file may be written, before anything is; return its resolved path.

    Arguments and errors are those of `moecc.checkpoint.outdir.check_output`.
    """
    file = Path(os.path.realpath(out))
    problems = Problems()
    if not file.parent.is_dir():
        hint = f"make it first: mkdir -p {file.parent}"
        problems.add("the parent of the output file does not exist", where=str(out), hint=hint)
    if file.is_dir():
        hint = "a GGUF output of another name is a folder with model.gguf"
        problems.add("the output is a folder, not a file", where=str(out), hint=hint)
    for path in (file, manifest_beside(file)):
        if os.path.lexists(path) and not path.is_dir() and not force:
            hint = "give another name, or --force to replace it once the new one is complete"
            problems.add("the output file exists", where=str(path), hint=hint)
    for source in inputs:
        check_apart(file, Path(os.path.realpath(source)), out, source, problems)
    check_leftovers(file, out, force, problems)
    problems.raise_if_any(InputError)
    require_machine(file, out, needed_bytes - leftover_bytes(file))
    return file


@contextmanager
def output_file(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
) -> Iterator[Path]:
    """Yield a temporary folder for ``model.gguf`` and its manifest; rename both at the end.

    The writer must have synchronised its files.  Arguments and errors are those of
    `check_output_file`.
    """
    file = check_output_file(out, inputs=inputs, force=force, needed_bytes=needed_bytes)
    temporary = partial_of(file)
    remove(temporary)
    make_private(temporary)
    try:
        with locked(temporary):
            yield temporary
            synchronise_folder(temporary)
            _put_in_place(temporary / FILE_NAME, file)
            _put_in_place(temporary / MANIFEST_NAME, manifest_beside(file))
            synchronise_folder(file.parent)
    finally:
        remove(temporary)


def _put_in_place(made: Path, file: Path) -> None:
    try:
        os.replace(made, file)
    except OSError as error:
        raise os_problem(error, file, "rename") from None
