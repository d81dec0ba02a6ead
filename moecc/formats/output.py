"""The output folder of a conversion: checked early, filled under a temporary name, then renamed.

The new folder is filled under a temporary name next to its destination and renamed
when it is complete.  Other processes see the old folder, no folder, or the complete new one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import CheckError, InputError, MachineError, MoeccError
from moecc.formats.disk import (
    BUSY,
    WAIT,
    bytes_of,
    claimed,
    disk,
    is_locked,
    public_mode,
    remove,
    remove_rest,
    synchronise_folder,
)
from moecc.formats.files import os_problem
from moecc.formats.gguf.storage import FILE_NAME
from moecc.formats.manifest import MANIFEST_NAME, manifest_beside, read_manifest, weight_file_record
from moecc.formats.writer import COMMIT_NAME, JOURNAL_NAME, has_journal
from moecc.support.problems import Problems

# The folders beside an output while it is written, and what a killed conversion left of them.
#
# ``OUT`` is filled as ``.OUT.moecc-partial``; an old output that it replaces is ``.OUT.moecc-
# old``
# between two renames and while it is deleted.  Both outlive a process that is killed.


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
      goes_on: whether a partial output is continued, see `moecc.formats.disk.claimed`.

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


# Put a file and its manifest in place, which are two renames, so that each state can be told.
#
# The journal is renamed first: from then on what is at the destination may be new.  An old
# manifest
# waits in the partial folder until the old file is replaced: never is a manifest beside a file
# that
# it is not of.  `settle` finishes or undoes what was interrupted.

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


# An output that is one file with its manifest beside it, committed as a folder is.
#
# ``OUT.gguf`` is filled in a temporary folder ``.OUT.gguf.moecc-partial`` next to it, and renamed
# from there when it is complete; then the manifest, ``OUT.gguf.moecc.json``.


def check_output_file(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    resume: bool = False,
) -> Path:
    """Check whether a file may be written, before anything is; return its resolved path.

    Arguments and errors are those of `moecc.formats.output.check_output`.
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
    `moecc.formats.output.output_folder`, errors those of `check_output_file`.
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


# Remove what killed writers left beside an output, or finish what they had all but finished.

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
