"""Open and read the files of a checkpoint, treating them as untrusted.

A file is checked with stat before it is opened, so that a FIFO or a device never blocks; it is read
with pread, never mapped, because a mapped file that shrinks kills the process; and it must be the
same file after a read as when its header was read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, Protocol

from moecc.errors import InputError, MachineError, MoeccError, Problem, Problems, quoted
from moecc.support.documents import parse_json_object
from moecc.support.text import amount
from moecc.support.untyped import JsonDict

OPEN_DESCRIPTORS = 16
READ_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
"""The bytes of a read: they should still be in the cache of the core when it is hashed."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Identity:
    """Identifies one state of a file.

    The time of the last status change cannot be set back, as that of the last modification can.
    """

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity in a stat result."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class Ranged(Protocol):
    """A file that is read by ranges from elsewhere, where its path holds an empty file."""

    identity: Identity
    sha256: str | None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a byte buffer from `offset`."""

    def refresh(self) -> None:
        """Bring `identity` up to date."""


RANGED: dict[Path, Ranged] = {}
"""The files of `moecc.formats.store`, by the paths that stand for them."""


def os_problem(error: OSError, path: Path, doing: str = "read") -> MoeccError:
    """Return the error for a failed system call on a file: InputError or MachineError."""
    reason = error.strerror or str(error)
    # A folder to write to is there, as has been checked: it takes no new files, as /proc does not.
    takes_none = doing == "write" and error.errno == errno.ENOENT
    if error.errno in _ABSENT and not takes_none:
        is_gone = error.errno == errno.ENOENT
        message = "no such file" if is_gone else f"cannot {doing} the file: {reason}"
        return InputError(message, where=path)
    hints = {
        errno.EACCES: f"give this user the right to {doing} it",
        errno.ENOSPC: "free some disk space",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
    }
    hint = hints.get(error.errno or 0)
    return MachineError(f"cannot {doing} the file: {reason}", where=path, hint=hint)


@contextmanager
def os_errors(path: Path, doing: str = "read") -> Iterator[None]:
    """Turn a failed system call on a file into an InputError or MachineError."""
    try:
        yield
    except OSError as error:
        raise os_problem(error, path, doing) from None


def identify(path: Path) -> Identity:
    """Return the identity of a regular file, without opening it.

    Raises:
      InputError: there is no such file, or it is a folder, FIFO, device or socket.
      MachineError: the system denies access.
    """
    try:
        with os_errors(path):
            status = os.stat(path)
    except ValueError:  # a NUL in the name
        raise InputError("the name of the file is not usable", where=repr(str(path))) from None
    _require_regular(status, path)
    return RANGED[path].identity if path in RANGED else Identity.of(status)


def open_regular(path: Path) -> tuple[int, Identity]:
    """Open a regular file for reading; return its descriptor and identity. Raises as `identify`."""
    identify(path)
    with os_errors(path):
        # O_NONBLOCK: a FIFO created since the check would otherwise block forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    try:
        _require_regular(status, path)
    except InputError:
        os.close(descriptor)
        raise
    return descriptor, RANGED[path].identity if path in RANGED else Identity.of(status)


@contextmanager
def opened_regular(path: Path) -> Iterator[tuple[int, Identity]]:
    """Yield the descriptor and the identity of a regular file. Raises as `identify`."""
    descriptor, identity = open_regular(path)
    try:
        yield descriptor, identity
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a byte buffer from `offset`.

    Raises:
      InputError: the file ends too early.
      MachineError: the system cannot read it.
    """
    if path in RANGED:
        RANGED[path].read_into(buffer, offset)
        return
    done = 0
    while done < len(buffer):
        with os_errors(path):
            count = os.preadv(descriptor, [buffer[done : done + READ_BYTES]], offset + done)
        if count == 0:
            raise InputError(
                "the file ends in the middle of a read",
                where=path,
                expected=f"at least {offset + len(buffer):,} bytes",
                found=f"{offset + done:,} bytes",
            )
        done += count


def require_unchanged(identities: Mapping[Path, Identity]) -> None:
    """Raise InputError with all files that are not as they were when they were identified."""
    problems = Problems()
    for path, identity in identities.items():
        with problems:
            if path in RANGED:
                RANGED[path].refresh()
            if identify(path) != identity:
                problems.extend((_changed(path),))
    problems.raise_if_any()


def _changed(path: Path) -> Problem:
    return Problem(
        "the file changed while it was being read",
        where=str(path),
        expected="the same file, size and times of change as when it was opened",
        hint="wait until nothing writes to the checkpoint any more, then start again",
    )


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Read a whole regular file of at most `limit_bytes`. Raises as `identify`."""
    with opened_regular(path) as (descriptor, identity):
        if identity.size_bytes > limit_bytes:
            raise InputError(
                "the file is too large for its kind",
                where=path,
                expected=f"at most {limit_bytes:,} bytes",
                found=f"{identity.size_bytes:,} bytes",
            )
        data = bytearray(identity.size_bytes)
        read_into(descriptor, memoryview(data), 0, path)
    return bytes(data)


def read_json_object(path: Path, *, limit_bytes: int) -> JsonDict:
    """Read a JSON object from a regular file of at most `limit_bytes`.

    Raises:
      InputError: missing, not a regular file, too large, or not strict JSON; all problems at once.
      MachineError: the file cannot be read.
    """
    return parse_json_object(read_bounded(path, limit_bytes), str(path))


def read_utf8(path: Path, limit_bytes: int, kind: str) -> str:
    """Read the text of a regular file of at most `limit_bytes`. Raises as `identify`.

    Raises:
      InputError: it is not UTF-8; `kind` says what should be, ``a recipe``.
    """
    try:
        # Editors of Windows begin a file with a byte order mark.
        return read_bounded(path, limit_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}: byte {error.start}"
        raise InputError(f"not text: {kind} is UTF-8", where=where) from None


def read_whole(path: Path) -> bytes:
    """Read a whole regular file, through one descriptor. Raises as `identify`."""
    return read_bounded(path, sys.maxsize)


def has_digest(path: Path, offset: int, nbytes: int, sha256: str) -> bool:
    """Return whether a part of a file has a digest; False if it cannot be read."""
    try:
        with opened_regular(path) as (descriptor, _):
            return range_digest(partial(read_into, descriptor, path=path), offset, nbytes) == sha256
    except MoeccError:
        return False


_local = threading.local()


def range_digest(
    read: Callable[[memoryview, int], None],
    offset: int,
    nbytes: int,
    stop: threading.Event | None = None,
) -> str:
    """Return the SHA-256 of a part of a file, in hexadecimal and in constant memory.

    Args:
      read: fills a buffer from an offset of the file.
      offset: where the part begins.
      nbytes: its size.
      stop: ends it with CancelledError once it is set.
    """
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(CHUNK_BYTES))
    buffer: memoryview = _local.buffer
    digest = hashlib.sha256()
    for done in range(0, nbytes, CHUNK_BYTES):
        if stop is not None and stop.is_set():
            raise CancelledError
        part = buffer[: min(CHUNK_BYTES, nbytes - done)]
        read(part, offset + done)
        digest.update(part)
    return digest.hexdigest()


def file_fault(path: Path, root: Path) -> Problem | None:
    """Return why a file in folder `root` must not be opened, or None.

    It must exist, be a regular file, and be inside the folder once symbolic links are resolved; a
    Hugging Face cache may link into the ``blobs`` of its own repository.
    """
    try:
        identify(path)
    except InputError as error:
        return error.problems[0]
    return link_fault(path, root)


def check_file(path: Path, root: Path) -> None:
    """Raise InputError if a file in folder `root` must not be opened; see `file_fault`."""
    if fault := file_fault(path, root):
        raise InputError((fault,))


def link_fault(path: Path, root: Path) -> Problem | None:
    """Return why a path leaves the folder `root` once links are resolved, or None; see above."""
    real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if real.is_relative_to(real_root) or real.parent in _own_blobs(real_root):
        return None
    return Problem(
        "the file is a symbolic link that leaves its folder",
        where=str(path),
        found=str(real),
        hint="put the file itself into the folder",
    )


def _own_blobs(real_root: Path) -> list[Path]:
    """Return the blob folder of the Hugging Face cache that contains a snapshot folder, if any."""
    return [above.parent / "blobs" for above in real_root.parents if above.name == "snapshots"][:1]


class DescriptorPool:
    """Accesses many files through a bounded number of descriptors; thread-safe.

    Args:
      limit: how many files may be open while nobody uses them.
      opener: opens a file; the default is for reading.
    """

    def __init__(
        self, limit: int = OPEN_DESCRIPTORS, opener: Callable[[Path], int] | None = None
    ) -> None:
        self._limit = limit
        self._opener = opener or (lambda path: open_regular(path)[0])
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[int, int] = {}
        self._closed = False

    def read_into(self, path: Path, identity: Identity, buffer: memoryview, offset: int) -> None:
        """Fill a byte buffer from `offset` of a file, which must still have the given identity.

        Raises:
          InputError: the file was truncated, changed or replaced since.
          MachineError: the system cannot read it.
        """
        with self.lease(path) as descriptor:
            try:
                read_into(descriptor, buffer, offset, path)
            finally:
                # Checked after the read, so that a change during it is detected.
                self._require_same(path, identity, descriptor)

    def close(self) -> None:
        """Close all descriptors; a read in progress finishes first."""
        with self._lock:
            self._closed = True
            self._shrink(0)

    def _require_same(self, path: Path, identity: Identity, descriptor: int) -> None:
        if path in RANGED or identify(path) == identity == Identity.of(os.fstat(descriptor)):
            return
        raise InputError([_changed(path)])

    @contextmanager
    def lease(self, path: Path) -> Iterator[int]:
        """Yield a descriptor of a file, which stays open meanwhile. Raises as the opener."""
        with self._lock:
            descriptor = self._take(path)
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[descriptor] -= 1
                self._shrink(0 if self._closed else self._limit)

    def _take(self, path: Path) -> int:
        if self._closed:
            raise InputError("the checkpoint is closed", where=path, hint="open it again")
        descriptor = self._open.get(path)
        if descriptor is None:
            self._shrink(self._limit - 1)
            descriptor = self._opener(path)
            self._open[path] = descriptor
            self._users[descriptor] = 0
        self._open.move_to_end(path)
        self._users[descriptor] += 1
        return descriptor

    def _shrink(self, limit: int) -> None:
        """Close the least recently used idle descriptors, down to `limit`."""
        idle = [path for path, descriptor in self._open.items() if not self._users[descriptor]]
        for path in idle[: max(0, len(self._open) - limit)]:
            descriptor = self._open.pop(path)
            del self._users[descriptor]
            os.close(descriptor)


def _require_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    raise InputError(
        "this is not a regular file",
        where=path,
        expected="a regular file",
        found=kinds.get(stat.S_IFMT(status.st_mode), "something else"),
    )


# Detect the actual type of a file from its first bytes, whatever its name.

SNIFFED_BYTES = 512

_CONVERT = (
    "moecc opens no pickle, because unpickling runs code; convert the model to safetensors "
    "in a sandbox, with a tool that you trust"
)
_FETCH = "the download did not fetch the content; fetch it again"


@dataclass(frozen=True, slots=True)
class FileKind:
    """A type of file: its name, a description for messages, and a way out."""

    name: str
    text: str
    hint: str | None = None


PICKLE = FileKind("pickle", "a Python pickle", _CONVERT)
ZIP = FileKind("zip", "a zip archive (PyTorch's own format is one, with a pickle inside)", _CONVERT)
LFS = FileKind(
    "lfs", "a Git LFS pointer: three lines of text in place of the file", "run `git lfs pull`"
)
HTML = FileKind("html", "an HTML page, perhaps an error page of a server", _FETCH)

_MAGIC: tuple[tuple[bytes, FileKind], ...] = (
    (b"GGUF", FileKind("GGUF", "a GGUF file", "give the .gguf file itself as the source")),
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", ZIP),
    (b"\x89HDF\r\n\x1a\n", FileKind("hdf5", "an HDF5 file (Keras, TensorFlow)", _CONVERT)),
    (b"\x93NUMPY", FileKind("numpy", "a NumPy array file")),
    (b"version https://git-lfs", LFS),
    (b"\x1f\x8b", FileKind("gzip", "a gzip archive", "unpack it first")),
    (b"\xfd7zXZ\x00", FileKind("xz", "an xz archive", "unpack it first")),
    (b"\x28\xb5\x2f\xfd", FileKind("zstd", "a zstd archive", "unpack it first")),
)
_PICKLE_PROTOCOLS = range(2, 6)
_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def sniff(head: bytes) -> FileKind | None:
    """Return the kind of a file that begins with `head`, or None if unknown."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if len(head) >= 2 and head[0] == 0x80 and head[1] in _PICKLE_PROTOCOLS:
        return PICKLE
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return HTML
    return None


def sniff_file(path: Path) -> FileKind | None:
    """Return the kind of a regular file.

    Raises:
      InputError: there is no such regular file.
      MachineError: it cannot be read.
    """
    with opened_regular(path) as (descriptor, identity):
        head = bytearray(min(SNIFFED_BYTES, identity.size_bytes))
        read_into(descriptor, memoryview(head), 0, path)
    return sniff(bytes(head))


# Limits on untrusted sizes and names, shared by all formats.

MAX_NAME_CHARACTERS = 1024

MAX_SIZE = (1 << 63) - 1
"""The largest size, offset or number of elements: the range of a signed 64-bit integer."""


def name_fault(name: str) -> str | None:
    """Return the problem of a tensor or file name, or None."""
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"the name is longer than {MAX_NAME_CHARACTERS:,} characters"
    if not name.isprintable():
        return "the name has control or invisible characters"
    return None


class DataSpan(NamedTuple):
    """The bytes [begin, end) that the data of a tensor take."""

    begin: int
    end: int
    name: str


def check_layout(
    spans: Iterable[DataSpan],
    start_bytes: int,
    size_bytes: int,
    path: Path,
    problems: Problems,
    *,
    must_cover: bool,
) -> None:
    """Report data of tensors that overlap, or end beyond the end of their file.

    Args:
      spans: the bytes that tensors claim, from `start_bytes` on.
      start_bytes: the offset in the file from which they count.
      size_bytes: the size of the file.
      path: the file.
      problems: receives what is wrong.
      must_cover: whether bytes that belong to no tensor are reported, too.
    """
    ordered = sorted(spans, key=lambda span: (span.begin, span.end))
    last = DataSpan(0, 0, "")
    where = path
    for span in ordered:
        if span.begin < last.end and span.end > span.begin:
            problems.add(
                f"the data of {quoted(last.name)} and {quoted(span.name)} overlap",
                where=where,
                found=f"bytes {last.begin:,}-{last.end:,} and {span.begin:,}-{span.end:,}",
            )
        elif must_cover and span.begin > last.end:
            after = f"of {quoted(last.name)}" if last.name else "of the header"
            problems.add(
                f"a hole between the end {after} and the data of {quoted(span.name)}",
                where=where,
                found=f"bytes {last.end:,}-{span.begin:,}",
            )
        if span.end > last.end:
            last = span
    surplus = size_bytes - start_bytes - last.end
    fault = hint = None
    if surplus < 0:
        beyond = [span.name for span in ordered if start_bytes + span.end > size_bytes]
        fault = (
            f"the file is cut short: the data of {amount(len(beyond), 'tensor')}, the first of "
            f"them {quoted(beyond[0])}, end beyond the end of the file"
        )
        hint = "the download may be incomplete; fetch the file again"
    elif surplus and must_cover:
        after = f"the last tensor {quoted(last.name)}" if last.name else "the header"
        fault = f"{surplus:,} bytes after {after} belong to no tensor"
    if fault:
        problems.add(
            fault,
            where=where,
            expected=f"a file of {start_bytes + last.end:,} bytes",
            found=f"{size_bytes:,} bytes",
            hint=hint,
        )


def is_recordable(name: str) -> bool:
    """Whether a manifest allows this file name: printable, and inside the folder everywhere."""
    path = PureWindowsPath(name)
    outside = path.drive or path.root or ".." in path.parts or "\\" in name
    return not (name_fault(name) or outside)


# The calls that change what is on the disk, all of them in one place.
#
# Outputs call nothing else to write, synchronise, rename and delete, so that a test can count the
# calls and end the process at any of them, or forget what was not synchronised.

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Disk:
    """The system's calls; each raises OSError as the system does."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file for writing, perhaps create it, and return a descriptor."""
        return os.open(path, flags, 0o666)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Set the size of a file."""
        os.ftruncate(descriptor, size_bytes)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at an offset; return how many bytes were written."""
        return os.pwrite(descriptor, data, offset)

    def append(self, descriptor: int, data: bytes) -> None:
        """Write at the end of a file that was opened to append."""
        os.write(descriptor, data)

    def release(self, descriptor: int) -> None:
        """Begin to bring what was written to the disk; what is there need not stay in memory.

        Promises nothing about what is on the disk.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):  # it is an advice
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        """Return once a file, or the names in a folder, are on the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; an empty folder of that name is replaced."""
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name, which another file may have."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        os.link(source, target)

    def copy(self, source: Path, target: Path) -> None:
        """Write the content of a file to a new file."""
        shutil.copyfile(source, target)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        """Make a folder."""
        os.mkdir(path, mode)

    def chmod(self, path: Path, mode: int) -> None:
        """Set the mode of a file or folder."""
        os.chmod(path, mode)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it, as far as possible; links are not followed."""
        # rmtree uses descriptors: a link created meanwhile is removed, never followed.
        shutil.rmtree(path, ignore_errors=True)


_disks: list[Disk] = [Disk()]


def disk() -> Disk:
    """Return the calls in force."""
    return _disks[-1]


@contextmanager
def injected(calls: Disk) -> Iterator[Disk]:
    """Let all outputs use `calls`, in all threads."""
    _disks.append(calls)
    try:
        yield calls
    finally:
        _disks.remove(calls)


# What outputs are written with: files and names of folders that are on the disk on return.


def json_content(document: JsonDict) -> bytes:
    """Return the content of a JSON file, indented for readers."""
    return (json.dumps(document, indent=2) + "\n").encode()


def write_durable(path: Path, content: bytes) -> None:
    """Write a new file and synchronise it to the disk.

    Raises:
      MachineError: the disk is full, or there is such a file.
    """
    with os_errors(path, "write"):
        descriptor = disk().open(path, CREATE)
        try:
            write_all(descriptor, memoryview(content), 0)
            synchronise(descriptor, path)
        finally:
            os.close(descriptor)


def replace_durable(path: Path, content: bytes) -> None:
    """Write a file that takes the place of an older one at once. Raises MachineError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_durable(partial, content)
    with os_errors(path, "rename"):
        disk().replace(partial, path)
    synchronise_folder(path.parent)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at an offset. Raises OSError."""
    while data:
        count = disk().write(descriptor, data, offset)
        data, offset = data[count:], offset + count


def synchronise(descriptor: int, path: Path) -> None:
    """Return once an open file, or the names in a folder, are on the disk. Raises MachineError."""
    with os_errors(path, "synchronise"):
        disk().sync(descriptor)


def synchronise_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises MachineError."""
    with os_errors(folder, "synchronise"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        synchronise(descriptor, folder)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder unless it is there. Raises MachineError."""
    if not path.is_dir():
        # Another process may make it at the same moment.
        with os_errors(path, "make"), suppress(FileExistsError):
            disk().mkdir(path)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders."""
    for path, _, names in os.walk(folder):
        yield from (Path(path) / name for name in sorted(names))


# Removal of what outputs made; links are not followed.


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


def require_removed(path: Path, problem: str) -> None:
    """Remove a folder or file, or raise MachineError with `problem` if it is still there."""
    remove(path)
    if os.path.lexists(path):
        raise MachineError(problem, where=path, hint="delete it yourself")


def remove_but(folder: Path, names: Collection[str]) -> None:
    """Remove whatever is in a folder but the files with these names."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name not in names or path.is_symlink() or not path.is_file():
            remove(path)
