"""An output that is one file with its manifest beside it, committed as a folder is.

``OUT.gguf`` is filled in a temporary folder ``.OUT.gguf.moecc-partial`` next to it, and renamed
from there when it is complete; then the manifest, ``OUT.gguf.moecc.json``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecc.checkpoint.filecommit import commit_file, settle, was_committed
from moecc.checkpoint.leftovers import check_leftovers, leftover_bytes, partial_of
from moecc.checkpoint.locks import claimed
from moecc.checkpoint.outdir import check_apart, require_machine
from moecc.checkpoint.problems import Problems
from moecc.checkpoint.records import manifest_beside
from moecc.checkpoint.removal import remove_rest
from moecc.errors import InputError


def check_output_file(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    resume: bool = False,
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
    if not force and not (resume and was_committed(file)):
        _check_absent(file, problems)
    for source in inputs:
        check_apart(file, Path(os.path.realpath(source)), out, source, problems)
    check_leftovers(file, out, force, problems, resume=resume)
    problems.raise_if_any(InputError)
    require_machine(file, out, needed_bytes - leftover_bytes(file))
    return file


def _check_absent(file: Path, problems: Problems) -> None:
    for path in (file, manifest_beside(file)):
        if os.path.lexists(path) and not path.is_dir():
            hint = "give another name, or --force to replace it once the new one is complete"
            problems.add("the output file exists", where=str(path), hint=hint)


@contextmanager
def output_file(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    goes_on: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder for ``model.gguf`` and its manifest; rename both at the end.

    The writer must have synchronised its files.  Arguments are those of
    `moecc.checkpoint.outdir.output_folder`, errors those of `check_output_file`.
    """
    resume, replaces = goes_on is not None, force
    file = check_output_file(
        out, inputs=inputs, force=force, needed_bytes=needed_bytes, resume=resume
    )

    def settled(partial: Path) -> bool:
        nonlocal replaces
        keep = goes_on is not None and goes_on(partial)
        replaces |= resume and was_committed(file)
        settle(file)
        return keep

    with claimed(partial_of(file), take_over=force or resume, goes_on=settled) as temporary:
        if not replaces:  # no other writer makes it from now on
            problems = Problems()
            _check_absent(file, problems)
            problems.raise_if_any(InputError)
        yield temporary
        commit_file(file)
        remove_rest(temporary)
