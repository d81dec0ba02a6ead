"""The output folder of a conversion: checked early, filled under a temporary name, then renamed.

The new folder is filled under a temporary name next to its destination and renamed
when it is complete.  Other processes see the old folder, no folder, or the complete new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moecc.checkpoint.disk import disk
from moecc.checkpoint.durable import synchronise_folder
from moecc.checkpoint.files import os_problem
from moecc.checkpoint.leftovers import check_leftovers, leftover_bytes, partial_of, replaced_of
from moecc.checkpoint.locks import claimed, public_mode
from moecc.checkpoint.problems import Problems
from moecc.checkpoint.removal import remove, remove_rest
from moecc.errors import InputError, MachineError, MoeccError

_SPACE_MARGIN_BYTES = 16 << 20

_FULL = "give another folder, or --force to replace it once the new one is complete"


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """A checked destination of an output folder.

    Attributes:
      folder: the destination, symbolic links resolved.
      replaces: whether an existing folder with content will be replaced.
    """

    folder: Path
    replaces: bool


def check_output(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    resume: bool = False,
    hint: str = _FULL,
) -> OutputPlace:
    """Check whether a folder may be written, before anything is; nothing is created.

    Args:
      out: the output folder.
      inputs: folders and files that are read, which the output must not touch.
      force: whether an existing folder may be replaced.
      needed_bytes: the size of the output.
      resume: whether a partial output is continued.
      hint: what to do where the folder is not empty.

    Raises:
      InputError: it is a file, not empty, equal to or inside an input or vice versa, the
        working folder or a mount point, or has no parent; a conversion is writing it, or was
        killed and left files, which `force` removes; all problems at once.
      MachineError: the parent is not writable, or the disk is too small.
    """
    folder = Path(os.path.realpath(out))
    problems = Problems()
    if not folder.parent.is_dir():
        hint = f"make it first: mkdir -p {folder.parent}"
        problems.add("the parent of the output folder does not exist", where=str(out), hint=hint)
    replaces = _check_existing(folder, out, force, problems, hint)
    for source in inputs:
        check_apart(folder, Path(os.path.realpath(source)), out, source, problems)
    check_leftovers(folder, out, force, problems, resume=resume)
    problems.raise_if_any(InputError)
    require_machine(folder, out, needed_bytes - leftover_bytes(folder))
    return OutputPlace(folder, replaces)


@contextmanager
def output_folder(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    goes_on: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it at the end, or remove it on any failure.

    The writer must have synchronised its files.  An old folder is replaced only once
    the new one is complete.

    Args:
      out: the output folder.
      inputs: folders and files that are read, which the output must not touch.
      force: whether an existing folder may be replaced.
      needed_bytes: the size of the output.
      goes_on: whether a partial output is continued, see `moecc.checkpoint.locks.claimed`.

    Raises: as `check_output`.
    """
    resume = goes_on is not None
    place = check_output(out, inputs=inputs, force=force, needed_bytes=needed_bytes, resume=resume)
    partial = partial_of(place.folder)
    with claimed(partial, take_over=force or resume, goes_on=goes_on) as temporary:
        place = _settled(place.folder, out, force)
        yield temporary
        _open_up(temporary)
        _synchronise_tree(temporary)
        _put_in_place(temporary, place)


def _settled(folder: Path, out: Path, force: bool) -> OutputPlace:
    """Look once more at the destination, which no other writer changes from now on."""
    problems = Problems()
    replaces = _check_existing(folder, out, force, problems, _FULL)
    problems.raise_if_any(InputError)
    if os.path.lexists(folder):  # else the old output is the only complete one
        remove(replaced_of(folder))
    return OutputPlace(folder, replaces)


def _open_up(folder: Path) -> None:
    try:
        disk().chmod(folder, public_mode(folder))
    except OSError as error:
        raise os_problem(error, folder, "set the mode of") from None


def _check_existing(folder: Path, out: Path, force: bool, problems: Problems, full: str) -> bool:
    """Report why an existing output cannot be replaced; return whether it has content."""
    where = str(out)
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        hint = "give the name of a new folder"
        problems.add("the output is a file, not a folder", where=where, hint=hint)
        return False
    if folder == Path.cwd() or folder in Path.cwd().parents:
        hint = "give the name of a new folder inside it"
        problems.add("the output is the working folder or holds it", where=where, hint=hint)
        return False
    if os.path.ismount(folder):
        hint = "give the name of a new folder inside it"
        problems.add(
            "the output is a mount point, which cannot be replaced", where=where, hint=hint
        )
        return False
    content = _names(folder)
    if content and not force:
        problems.add(
            "the output folder is not empty",
            where=where,
            found=f"{len(content):,} entries, {content[0]!r} among them",
            hint=full,
        )
    return bool(content)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise os_problem(error, folder) from None


def check_apart(folder: Path, source: Path, out: Path, given: Path, problems: Problems) -> None:
    """Report an output that equals an input, is inside it, or contains it.

    Args:
      folder: the output, symbolic links resolved.
      source: the input, likewise.
      out: the output as the user gave it.
      given: the input, likewise.
      problems: receives what is wrong.
    """
    if _same(folder, source):
        what = "the output is the input"
    elif any(_same(above, source) for above in folder.parents):
        what = "the output is inside the input"
    elif any(_same(above, folder) for above in source.parents):
        what = "the input is inside the output"
    else:
        return
    hint = "choose a folder outside the input"
    problems.add(what, where=str(out), found=f"the input {given}", hint=hint)


def _same(one: Path, other: Path) -> bool:
    """Compare two resolved paths, by inode where both exist (case-blind disks, bind mounts)."""
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def require_machine(folder: Path, out: Path, needed_bytes: int) -> None:
    """Raise MachineError unless an output of a size can be written beside its name."""
    parent = folder.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError("no right to write into the parent of the output", where=str(out))
    try:
        free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        raise os_problem(error, parent, "measure") from None
    if free_bytes < needed_bytes + _SPACE_MARGIN_BYTES:
        raise MachineError(
            "the disk is too small for the output",
            where=str(out),
            expected=f"{needed_bytes + _SPACE_MARGIN_BYTES:,} bytes free",
            found=f"{free_bytes:,} bytes free",
            hint="free some space, or write to another disk; an old output counts until replaced",
        )


def _synchronise_tree(folder: Path) -> None:
    """Make the names in a folder and its subfolders durable."""
    for path, _, _ in os.walk(folder):
        synchronise_folder(Path(path))


def _put_in_place(temporary: Path, place: OutputPlace) -> None:
    old = replaced_of(place.folder)
    try:
        if place.replaces:
            _rename(place.folder, old)
        _rename_in(temporary, place.folder)
    except BaseException:
        if place.replaces and os.path.lexists(old):
            _settle(temporary, place.folder, old)
        raise
    if os.path.lexists(old):
        remove_rest(old)


def _settle(temporary: Path, folder: Path, old: Path) -> None:
    """After an interruption: the new output has its place, or the old one gets it back."""
    if not os.path.lexists(temporary):
        _confirm(folder)
        remove_rest(old)
    elif not os.path.lexists(folder):
        _rename(old, folder)


def _rename(source: Path, target: Path) -> None:
    try:
        disk().rename(source, target)
    except OSError as error:
        raise os_problem(error, source, "rename") from None


def _rename_in(temporary: Path, folder: Path) -> None:
    try:
        disk().rename(temporary, folder)  # also replaces an empty folder
    except OSError as error:
        if os.path.isdir(folder) and os.listdir(folder):
            raise InputError(
                "the output folder was filled by another process in the meantime",
                where=str(folder),
            ) from None
        raise os_problem(error, folder, "rename") from None
    _confirm(folder)


def _confirm(folder: Path) -> None:
    """Make the name of an output that has its place durable."""
    try:
        synchronise_folder(folder.parent)
    except MoeccError as error:
        raise MachineError(
            "the output is complete, but a loss of power may take it: the folder around it cannot "
            "be synchronised", where=str(folder), found=error.problems[0].what,
            hint="check the disk (dmesg); then sync, and moecc verify OUT",
        ) from None  # fmt: skip
