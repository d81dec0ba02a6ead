"""Outputs that appear complete or not at all: a folder, or a GGUF file with its manifest.

``OUT`` is filled as ``.OUT.moecc-partial`` beside it and renamed when it is complete; an old
output that it replaces is ``.OUT.moecc-old`` between two renames and while it is deleted.  Other
processes see the old output, none, or the complete new one.  Both folders outlive a process that
is killed.

An output is committed in this order: its files are synchronised, then its folders, then it is
renamed to its final name, then the folder of that name is synchronised.  After a loss of power
the final name is either absent or complete.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moecc.errors import CheckError, InputError, MachineError, MoeccError, Problems
from moecc.formats.files import (
    disk,
    os_errors,
    os_problem,
    remove,
    remove_but,
    require_removed,
    synchronise_folder,
)
from moecc.formats.gguf.storage import FILE_NAME
from moecc.formats.manifest import MANIFEST_NAME, manifest_beside, read_manifest, weight_file_record
from moecc.formats.safetensors import ConversionPart
from moecc.formats.writer import COMMIT_NAME, JOURNAL_NAME, has_journal

BUSY = "another conversion is writing this output"
WAIT = "wait until it has finished"
LEFT_BEHIND = "an earlier conversion was killed and left its partial output behind"
_REPLACES = "--force (in Python force=True) replaces it once the new one is complete"
_FULL = f"give another folder; {_REPLACES}"
_UNDELETED = "the new output is complete, but this could not be deleted"
_PRIVATE = 0o700
_BLOCK_BYTES = 512
_SPACE_MARGIN_BYTES = 16 << 20
_OLD_MANIFEST = "old_manifest.json"


def partial_of(output: Path) -> Path:
    """Return the folder where `output` is filled."""
    return output.parent / f".{output.name}.moecc-partial"


def replaced_of(output: Path) -> Path:
    """Return the name of the old `output` until the new one has its name."""
    return output.parent / f".{output.name}.moecc-old"


def parts_of(output: Path) -> Path:
    """Return the folder of the parts of `output`, see `moecc.formats.parts`."""
    path = Path(os.path.realpath(output))
    return path.parent / f".{path.name}.moecc-parts"


def part_folder(out: Path, part: ConversionPart) -> Path:
    """Return the folder of a part of an output."""
    return parts_of(out) / f"{part.number:05d}-of-{part.count:05d}"


@contextmanager
def output_folder(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    can_resume: Callable[[Path], bool] | None = None,
    hint: str = _FULL,
    is_file: bool = False,
) -> Iterator[Path]:
    """Yield a temporary folder to fill; commit it at the end, or remove it on any failure.

    The writer must have synchronised its files.  An old output is replaced only once the new one
    is complete.

    Args:
      out: the output.
      inputs: folders and files that are read, which the output must not touch.
      force: whether an existing output may be replaced.
      needed_bytes: the size of the output.
      can_resume: whether a partial output is continued, see `claimed`; by default it is an error.
      hint: what to do where the folder is not empty.
      is_file: whether the output is one file, which the folder holds as ``model.gguf`` beside its
        manifest; otherwise it is the folder.

    Raises: as `check_output`.
    """
    resume = can_resume is not None
    path = check_output(
        out, inputs=inputs, force=force, needed_bytes=needed_bytes, resume=resume, hint=hint,
        is_file=is_file,
    )  # fmt: skip
    is_complete = False

    def settle_and_ask(partial: Path) -> bool:
        nonlocal is_complete
        keep = can_resume is not None and can_resume(partial)
        is_complete = resume and was_committed(path)
        settle(path)
        return keep

    ask = settle_and_ask if is_file else can_resume
    with claimed(partial_of(path), take_over=force or resume, can_resume=ask) as temporary:
        # From here on no other writer makes the output.
        problems = Problems()
        if is_file:
            _check_file(path, force or is_complete, problems)
            problems.raise_if_any()
            yield temporary
            _commit_file(path)
            require_removed(temporary, _UNDELETED)
            return
        replaces = _check_folder(path, out, force, problems, hint)
        problems.raise_if_any()
        if os.path.lexists(path):  # else the old output is the only complete one
            remove(replaced_of(path))
        yield temporary
        with os_errors(temporary, "set the mode of"):
            disk().chmod(temporary, _public_mode(temporary))
        for folder, _, _ in os.walk(temporary):
            synchronise_folder(Path(folder))
        _commit_folder(temporary, path, replaces)


def check_output(
    out: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    needed_bytes: int = 0,
    resume: bool = False,
    hint: str = _FULL,
    is_file: bool = False,
) -> Path:
    """Check whether an output may be written, before anything is; nothing is created.

    Args:
      out: the output folder or file.
      inputs: folders and files that are read, which the output must not touch.
      force: whether an existing output may be replaced.
      needed_bytes: the size of the output.
      resume: whether a partial output is continued.
      hint: what to do where the folder is not empty.
      is_file: whether the output is one file with its manifest beside it.

    Returns:
      The output, symbolic links resolved.

    Raises:
      InputError: a folder is not empty, the working folder or a mount point; a file exists; one is
        the other; the output is equal to or inside an input or vice versa, or has no parent; a
        conversion is writing it, or was killed and left files, which `force` removes; all problems
        at once.
      MachineError: the parent is not writable, or the disk is too small.
    """
    path = Path(os.path.realpath(out))
    problems = Problems()
    if not path.parent.is_dir():
        problems.add(
            f"the parent of the output {'file' if is_file else 'folder'} does not exist",
            where=out,
            hint=f"make it first: mkdir -p {shlex.quote(str(path.parent))}",
        )
    for source in inputs:
        _check_apart(path, Path(os.path.realpath(source)), out, source, problems)
    if is_file:
        if path.is_dir():
            problems.add(
                "the output is a folder, not a file",
                where=out,
                hint="a GGUF output of another name is a folder with model.gguf",
            )
        _check_file(path, force or (resume and was_committed(path)), problems)
    else:
        # Of an input it is no news that it has content.
        _check_folder(path, out, force or bool(problems), problems, hint)
    _check_leftovers(path, out, force, problems, resume)
    problems.raise_if_any()
    _require_machine(path, out, needed_bytes - _bytes_in(partial_of(path)))
    return path


def _check_folder(folder: Path, out: Path, force: bool, problems: Problems, hint: str) -> bool:
    """Report why an existing folder cannot be replaced; return whether it has content."""
    if not os.path.lexists(folder):
        return False
    inside = "give the name of a new folder inside it"
    fault = None
    if not folder.is_dir():
        fault, inside = "the output is a file, not a folder", "give the name of a new folder"
    elif folder == Path.cwd() or folder in Path.cwd().parents:
        fault = "the output is the working folder or holds it"
    elif os.path.ismount(folder):
        fault = "the output is a mount point, which cannot be replaced"
    if fault:
        problems.add(fault, where=out, hint=inside)
        return False
    with os_errors(folder):
        names = sorted(os.listdir(folder))
    if names and not force:
        content = f"{len(names):,} entries, {names[0]!r} among them"
        problems.add("the output folder is not empty", where=out, found=content, hint=hint)
    return bool(names)


def _check_file(file: Path, may_replace: bool, problems: Problems) -> None:
    """Report a file or manifest that exists."""
    for path in () if may_replace else (file, manifest_beside(file)):
        if os.path.lexists(path) and not path.is_dir():
            hint = f"give another name; {_REPLACES}"
            problems.add("the output file exists", where=path, hint=hint)


def _check_apart(path: Path, source: Path, out: Path, input_: Path, problems: Problems) -> None:
    """Report an output that equals an input, is inside it, or contains it.

    `path` and `source` are the output and the input with symbolic links resolved.
    """
    if _is_same(path, source):
        fault = "the output is the input"
    elif any(_is_same(above, source) for above in path.parents):
        fault = "the output is inside the input"
    elif any(_is_same(above, path) for above in source.parents):
        fault = "the input is inside the output"
    else:
        return
    hint = "choose a folder outside the input"
    problems.add(fault, where=out, found=f"the input {input_}", hint=hint)


def _is_same(a: Path, b: Path) -> bool:
    """Compare two resolved paths, by inode where both exist (case-blind disks, bind mounts)."""
    try:
        return a == b or os.path.samefile(a, b)
    except OSError:
        return False


def _check_leftovers(path: Path, out: Path, force: bool, problems: Problems, resume: bool) -> None:
    """Report a conversion that is running, and without `force` what a killed one left.

    With `resume` a partial output is no problem: it is continued.
    """
    partial, old = partial_of(path), replaced_of(path)
    if is_locked(partial):
        problems.add(BUSY, where=out, found=str(partial), hint=WAIT)
        return
    if force:
        return
    if os.path.lexists(partial) and not resume:
        option = "--resume continues it, " if has_journal(partial) else ""
        problems.add(
            LEFT_BEHIND,
            where=out,
            found=f"{partial}, {_bytes_in(partial):,} bytes",
            hint=f"{option}--force removes it, and so does moecc clean",
        )
    if os.path.lexists(old):
        clean = f"moecc clean {shlex.quote(str(out))}"
        clean_hint = "" if os.path.lexists(path) else f"; {clean} brings it back"
        problems.add(
            "an earlier conversion was killed while it replaced this output",
            where=out,
            found=f"the old output is {old}",
            hint=f"--force removes it once the new one is complete{clean_hint}",
        )


def _require_machine(path: Path, out: Path, needed_bytes: int) -> None:
    """Raise MachineError unless an output of a size can be written beside its name."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise MachineError("no right to write into the parent of the output", where=out)
    with os_errors(path.parent, "measure"):
        free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes + _SPACE_MARGIN_BYTES:
        raise MachineError(
            "the disk is too small for the output",
            where=out,
            expected=f"{needed_bytes:,} bytes, and {_SPACE_MARGIN_BYTES:,} that stay free",
            found=f"{free_bytes:,} bytes free",
            hint="free some space, or write to another disk; an old output counts until replaced",
        )


def _bytes_in(path: Path) -> int:
    """Return the disk space that the files in a folder take."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * _BLOCK_BYTES
    return total


# Locks: a folder is emptied and removed only while its lock is held, so no writer removes what
# another one fills.  The system releases a lock with the process that holds it: what a killed
# process left is free.


@contextmanager
def claimed(
    folder: Path, *, take_over: bool, can_resume: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a locked folder that only this user can enter; remove it on any exception.

    Args:
      folder: the folder, made unless it is there.
      take_over: whether to take what a killed process left there.
      can_resume: whether that is continued, called while the lock is held; otherwise it is
        removed.  If it raises, everything stays as it is.

    Raises:
      InputError: another process has the folder.
      MachineError: it cannot be made.
    """
    try:
        try:
            if take_over and (folder.is_symlink() or folder.is_file()):
                disk().unlink(folder)
            disk().mkdir(folder, _PRIVATE)
        except FileExistsError:
            if not take_over:
                raise InputError(BUSY, where=folder, hint=WAIT) from None
        except OSError as error:
            raise os_problem(error, folder, "make") from None
        with _locked(folder):
            keep = can_resume is not None and can_resume(folder)
            try:
                if not keep:
                    remove_but(folder, ())
                yield folder
            except BaseException:  # Ctrl-C and SIGTERM included: nothing half-written remains
                remove(folder)
                raise
    except MoeccError:
        raise
    except BaseException:  # perhaps between making and locking it
        with suppress(OSError):
            os.rmdir(folder)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises InputError if another process took the folder."""
    with os_errors(folder, "open"):
        descriptor = _open_folder(folder)
    try:
        if not lock_folder(descriptor) or not _is_at(descriptor, folder):
            raise InputError(BUSY, where=folder, hint=WAIT)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder."""
    try:
        descriptor = _open_folder(folder)
    except OSError:
        return False
    try:
        return not lock_folder(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(descriptor: int) -> bool:
    """Take the lock of an open folder; return whether no other process has it.

    Where the file system has no locks there is none to take, and none that another process has.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except OSError:
        return False


def _public_mode(folder: Path) -> int:
    """Return the mode that a private folder has once it is complete.

    Umask and default access lists decide it, so it is read from a file that was made inside.
    """
    example = next((path for path in sorted(folder.iterdir()) if path.is_file()), None)
    if example is None:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o777 & ~mask
    else:
        mode = example.stat().st_mode & 0o666
        mode |= (mode & 0o444) >> 2
    return mode | folder.stat().st_mode & 0o7000


# Commit a folder: at most two renames, between which the old output has another name.


def _commit_folder(temporary: Path, folder: Path, replaces: bool) -> None:
    old = replaced_of(folder)
    try:
        if replaces:
            _rename(folder, old)
        try:
            disk().rename(temporary, folder)  # also replaces an empty folder
        except OSError as error:
            if os.path.isdir(folder) and os.listdir(folder):
                fault = "the output folder was filled by another process in the meantime"
                raise InputError(fault, where=folder) from None
            raise os_problem(error, folder, "rename") from None
        _confirm(folder)
    except BaseException:
        if replaces and os.path.lexists(old):
            # The new output has its name, or the old one gets it back.
            if not os.path.lexists(temporary):
                _confirm(folder)
                require_removed(old, _UNDELETED)
            elif not os.path.lexists(folder):
                _rename(old, folder)
        raise
    if os.path.lexists(old):
        require_removed(old, _UNDELETED)


def _rename(source: Path, target: Path) -> None:
    with os_errors(source, "rename"):
        disk().rename(source, target)


def _confirm(folder: Path) -> None:
    """Make the name of an output that has its name durable."""
    try:
        synchronise_folder(folder.parent)
    except MoeccError as error:
        raise MachineError(
            "the output is complete, but a loss of power may take it: the folder around it cannot "
            "be synchronised",
            where=folder,
            found=error.problems[0].message,
            hint="check the disk (dmesg); then sync, and moecc verify OUT",
        ) from None


# Commit a file and its manifest, which are two renames, so that each state can be told.
#
# The journal is renamed first: from then on the file at the destination may be new.  An old
# manifest waits in the partial folder until the old file is replaced: never is a manifest beside
# a file of which it is not the manifest.  `settle` finishes or undoes what was interrupted.


def _commit_file(file: Path) -> None:
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


def _replace(source: Path, target: Path) -> None:
    with os_errors(target, "rename"):
        disk().replace(source, target)


# Remove what killed writers left beside an output, or finish what they had all but finished.

_LEFTOVER = re.compile(r"\.(.+)\.moecc-(?:partial|old|parts)")


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
    path = Path(os.path.realpath(out))
    if match := _LEFTOVER.fullmatch(path.name):
        path = path.with_name(match[1])
    partial, old, parts = partial_of(path), replaced_of(path), parts_of(path)
    if not any(map(os.path.lexists, (partial, old, parts))):
        return []
    for folder in sorted(parts.glob(".*.moecc-partial")):
        if is_locked(folder):
            raise InputError(BUSY, where=folder, hint=WAIT)
    sizes_bytes = {p: _bytes_in(p) for p in (partial, parts) if os.path.lexists(p)}
    undeleted = "it cannot be removed"
    lines = []
    with claimed(partial, take_over=True, can_resume=lambda _: True):
        if manifest := settle(path):
            lines.append(f"put {manifest} in place")
        if os.path.lexists(old) and os.path.lexists(path):
            require_removed(old, undeleted)
            lines.append(f"removed {old}, which {path} has replaced")
        elif os.path.lexists(old):
            _rename(old, path)
            synchronise_folder(path.parent)
            lines.append(f"put {old} back as {path}")
        require_removed(parts, undeleted)
        require_removed(partial, undeleted)
    lines += [f"removed {folder}, {nbytes:,} bytes" for folder, nbytes in sizes_bytes.items()]
    return lines
