"""Folders in object stores and on the Hugging Face hub, read by ranges through fsspec.

A folder of a store is mirrored by a local folder of empty files with the same names. The readers
of `moecc.formats` see names and sizes there, and each read of a mirrored file becomes a request
for its range (`moecc.formats.files.RANGED`), so that headers and needed tensors alone are moved.
A program that opens a mirrored file itself sees no content rather than a wrong one.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from moecc.errors import ALIASES, InputError, MachineError, MoeccError, UsageError, printable
from moecc.formats.files import RANGED, Identity, os_errors
from moecc.formats.folder import TEMPLATES
from moecc.support.untyped import JsonDict

HUB = "hf"
_EXTRAS = {"s3": "s3", "gs": "gs", HUB: "hub"}
_ADDRESS = re.compile(r"(s3|gs|hf)://|hf:")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
_OTHER_STORE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_HUB_PATH = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?"
    r"(?:/(?P<path>.*))?",
    re.ASCII | re.DOTALL,
)
_BUCKET_PATH = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}(?:/.*)?", re.ASCII | re.DOTALL)
_BUCKET_RULE = (
    "a bucket has two or more small letters, digits, dots or dashes; no part is empty, '.' or '..'"
)
_SHAPES = {
    "s3": "s3://BUCKET/FOLDER",
    "gs": "gs://BUCKET/FOLDER",
    HUB: "hf://ORG/NAME, or hf://ORG/NAME@REVISION",
}
_ACCESS = {
    "s3": "credentials are those of the AWS command line: AWS_PROFILE, AWS_ACCESS_KEY_ID, a role",
    "gs": "credentials are the application default ones: gcloud auth application-default login",
    HUB: "ask for access on the model's page, then `hf auth login`, or set HF_TOKEN",
}

CLAIM_NAME, UPLOADING = "moecc_claim.txt", "uploading"
"""The object by which a writer claims an output, and its first word while files are uploaded."""

TRANSFERS = 8
"""Files that are moved at the same time: a chunk of an array is small beside the way to a store."""

_BLOCK_BYTES = 256 << 10
_CACHE_BYTES = 4 << 30
"""Experts are copies of one layer, so that its weights are read once for each expert."""
_LARGEST_REQUEST, _FURTHEST_AHEAD = 128, 64
"""Blocks that one request fetches, and that it fetches ahead of sequential small reads."""


def is_address(source: str) -> bool:
    """Whether `source` is the address of a folder or file in a store.

    Raises:
      UsageError: it is one of another store, and would be read as a folder ``az:``.
    """
    if _ADDRESS.match(source) is not None:
        return True
    match = _OTHER_STORE.match(source)
    if match is not None:
        raise UsageError(
            "not an address in a store",
            expected="s3://, gs:// or hf://, or a folder",
            found=f"{match[1]}:/…",
        )
    return False


def is_place(source: str) -> bool:
    """Whether `source` is a path, and no name with a scheme, such as ``preset:`` or ``s3:``."""
    return _SCHEME.match(source) is None


def absolute_place(source: str, folder: Path) -> str:
    """Return a path that is relative to `folder` as an absolute one; other names stay."""
    return os.path.abspath(folder / os.path.expanduser(source)) if is_place(source) else source


@dataclass(frozen=True)
class Address:
    """An address in a store.

    Attributes:
      scheme: ``s3``, ``gs`` or ``hf``.
      path: the bucket and the key, or the model and the path in it; without the revision.
      revision: the revision of a model of the hub; empty for its main branch.
    """

    scheme: str
    path: str
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the parts of an address.

        Raises:
          UsageError: it has another form, or holds credentials.
        """
        scheme, _, path = text.partition(":")
        path = path.removeprefix("//").rstrip("/")
        pattern = _HUB_PATH if scheme == HUB else _BUCKET_PATH
        match = pattern.fullmatch(path)
        is_odd = not {"", ".", ".."}.isdisjoint(path.split("/"))
        if match is None or "?" in path or is_odd or not path.isprintable():
            # An address with an @ before the bucket holds a password, which no message repeats.
            secret = scheme != HUB and ("@" in path or "?" in path)
            raise UsageError(
                "not an address in a store",
                expected=_SHAPES[scheme],
                found=f"{scheme}://…" if secret else printable(text),
                hint=_ACCESS[scheme] if secret else None if scheme == HUB else _BUCKET_RULE,
            )
        if scheme != HUB:
            return cls(scheme, path)
        inner = f"/{match['path']}" if match["path"] else ""
        return cls(scheme, match["name"] + inner, unquote(match["revision"] or ""))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> Address:
        """The folder around it."""
        return Address(self.scheme, str(PurePosixPath(self.path).parent), self.revision)

    @property
    def in_store(self) -> str:
        """The path as fsspec takes it."""
        if not self.revision:
            return self.path
        organisation, name, *inner = self.path.split("/")
        revision = self.revision.replace("/", "%2F")
        return "/".join([organisation, f"{name}@{revision}", *inner])

    def __str__(self) -> str:
        return f"{self.scheme}://{self.in_store}"


def require_package(address: Address) -> None:
    """Raise MachineError if the package of a store is missing."""
    from moecc.support.extras import require

    require(f"an address of {address.scheme}://", [_EXTRAS[address.scheme]])


def file_system(address: Address) -> Any:
    """Return fsspec's access to a store. Raises MachineError if its package is missing."""
    require_package(address)
    import fsspec

    with store_errors(address):
        return fsspec.filesystem(address.scheme)


# Errors of a store: each library has its own, and their texts may hold signed addresses.

_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
_DENIED = ("Gated", "Permission", "Credential", "AccessDenied", "Forbidden", "Unauthorized")
_ABSENT = ("NotFound", "NoSuch", "IsADirectory")


def without_secrets(text: str) -> str:
    """Return `text` without query strings, passwords in addresses, and secrets of this process."""
    text = re.sub(r"(?<=://)[^/\s@]+@", "…@", re.sub(r"\?[^\s'\"]*", "?…", text))
    text = re.sub(r"(?i)(bearer|basic)\s+\S+", r"\1 …", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return text


@contextmanager
def store_errors(address: Address | str, doing: str = "read") -> Iterator[None]:
    """Turn an exception of a library of stores into an InputError or a MachineError."""
    try:
        yield
    except MoeccError:
        raise
    except Exception as error:
        raise _store_error(error, str(address), doing) from None


def _store_error(error: Exception, address: str, doing: str) -> MoeccError:
    names = {kind.__name__ for kind in type(error).__mro__}
    words = " ".join(str(error).split())
    text = printable(without_secrets(f"{type(error).__name__}: {words}"), 300)
    access = _ACCESS[address.partition(":")[0]]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if any(word in name for word in _DENIED for name in names) or status == 403:
        return MachineError("the store denies access", where=address, found=text, hint=access)
    if any(word in name for word in _ABSENT for name in names):
        fault = f"cannot {doing} it: the store has no such folder or file"
        hint = f"is the name right? If it is private, {access}"
        return InputError(fault, where=address, found=text, hint=hint)
    hint = "is the store reachable? The same command may succeed later"
    return MachineError(f"cannot {doing} it", where=address, found=text, hint=hint)


# Files of a store, read by ranges.


class _BlockCache:
    """Blocks of files of stores that were read last, in a temporary file; thread-safe."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the process
        atexit.register(self._file.close)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self._limit = max(1, min(_CACHE_BYTES, free // 4) // _BLOCK_BYTES)
        self._slots: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slots

    def get(self, key: Hashable) -> bytes | None:
        """Return a block, or None if it is not there."""
        with self._lock:
            if key not in self._slots:
                return None
            self._slots.move_to_end(key)
            slot, size = self._slots[key]
            return os.pread(self._file.fileno(), size, slot * _BLOCK_BYTES)

    def put(self, key: Hashable, block: memoryview) -> None:
        """Add a block in the place of the one that was used the longest time ago."""
        with self._lock:
            if key in self._slots:
                return
            is_full = len(self._slots) >= self._limit
            slot = self._slots.popitem(last=False)[1][0] if is_full else len(self._slots)
            try:
                written = os.pwrite(self._file.fileno(), block, slot * _BLOCK_BYTES)
            except OSError:  # the disk is full: what is not kept is fetched again
                written = -1
            if written == len(block):
                self._slots[key] = slot, written
            else:
                self._limit = max(1, len(self._slots))


@cache
def _blocks() -> _BlockCache:
    return _BlockCache()


_local = threading.local()


class RangedFile:
    """A file of a store; see `moecc.formats.files.RANGED`.

    Attributes:
      address: its address.
      identity: its size, and its entity tag in the place of times.
      sha256: the digest that the store states, or None.
    """

    def __init__(self, address: Address, system: Any, entry: JsonDict) -> None:
        self.address = address
        self._system = system
        self._copy: Path | None = None
        self._state(entry)

    def _state(self, entry: JsonDict) -> None:
        lfs = entry.get("lfs")
        self.sha256: str | None = getattr(lfs, "sha256", None)
        tags = (entry.get(k) for k in ("ETag", "etag", "generation", "blob_id"))
        tag = self.sha256 or next((str(t) for t in tags if t), "")
        number = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "big")
        self.identity = Identity(0, 0, int(entry["size"]), number, 0)

    def refresh(self) -> None:
        """Ask the store for the state of the file again. Raises as `store_errors`."""
        if self.address.scheme == HUB:  # a commit never changes
            return
        with store_errors(self.address):
            self._system.invalidate_cache(self._system._parent(self.address.in_store))
            self._state(self._system.info(self.address.in_store))

    def fetch(self, path: Path) -> None:
        """Copy the whole file to `path`, from which it is read then. Raises as `read_into`."""
        if self._copy is None:
            get_file(self._system, self.address, path, self.identity.size_bytes)
            self._copy = path

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a byte buffer from `offset`.

        Raises:
          InputError: the file ends too early.
          MachineError: the store denies access, or does not answer.
        """
        end = offset + len(buffer)
        if end > self.identity.size_bytes:
            raise InputError(
                "the file ends in the middle of a read",
                where=str(self.address),
                expected=f"at least {end:,} bytes",
                found=f"{self.identity.size_bytes:,} bytes",
            )
        if self._copy is not None:
            with os_errors(self._copy), self._copy.open("rb") as file:
                file.seek(offset)
                file.readinto(buffer)
            return
        at = offset
        while at < end:
            block, skipped = divmod(at, _BLOCK_BYTES)
            data = _blocks().get(self._key(block)) or self._load(block, -(-end // _BLOCK_BYTES))
            part = data[skipped : skipped + end - at]
            buffer[at - offset : at - offset + len(part)] = part
            at += len(part)

    def _key(self, block: int) -> Hashable:
        return str(self.address), self.identity, block

    def _load(self, first: int, stop: int) -> bytes:
        """Fetch blocks from `first` on, to `stop` or further where reads go on; return them."""
        is_sequential = getattr(_local, "next", None) == self._key(first)
        _local.ahead = min(2 * _local.ahead, _FURTHEST_AHEAD) if is_sequential else 1
        count = max(min(stop - first, _LARGEST_REQUEST), _local.ahead)
        size = self.identity.size_bytes
        count = min(count, -(-size // _BLOCK_BYTES) - first)
        cached = (n for n in range(1, count) if self._key(first + n) in _blocks())
        count = next(cached, count)
        start = first * _BLOCK_BYTES
        data = self._range(start, min(count * _BLOCK_BYTES, size - start))
        for n in range(count):
            block = memoryview(data)[n * _BLOCK_BYTES : (n + 1) * _BLOCK_BYTES]
            _blocks().put(self._key(first + n), block)
        _local.next = self._key(first + count)
        return data

    def _range(self, offset: int, nbytes: int) -> bytes:
        # The file of the hub would read five megabytes ahead.
        options = {"cache_type": "none"} if self.address.scheme == HUB else {}
        with store_errors(self.address):
            data: bytes = self._system.cat_file(
                self.address.in_store, start=offset, end=offset + nbytes, **options
            )
        _require_size(self.address, nbytes, len(data), f" from byte {offset:,}")
        return data


def _require_size(address: Address, expected: int, actual: int, part: str = "") -> None:
    if actual != expected:
        raise MachineError(
            "the store sent another number of bytes than it was asked for",
            where=str(address),
            expected=f"{expected:,} bytes{part}",
            found=f"{actual:,} bytes",
            hint="the same command may succeed later",
        )


def get_file(system: Any, address: Address, path: Path, nbytes: int) -> None:
    """Copy a file of a store, which has `nbytes`, to this machine.

    Raises:
      InputError: it is gone.
      MachineError: the store denies access, does not answer, or sends another number of bytes; the
        disk is full.
    """
    with os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with store_errors(address):
        system.get_file(address.in_store, str(path))
    _require_size(address, nbytes, path.stat().st_size)


def fetch(folder: Path) -> None:
    """Copy the files of a mirrored folder to this machine, for readers that open them themselves.

    Raises: as `get_file`. Folders of this machine are left as they are.
    """
    paths = [path for path in (folder, *folder.rglob("*")) if path in RANGED]

    def copy(path: Path) -> None:
        if isinstance(file := RANGED[path], RangedFile):
            file.fetch(path)

    with ThreadPoolExecutor(TRANSFERS) as threads:
        list(threads.map(copy, paths))


def no_subfolders(files: Collection[str], folders: Collection[str]) -> Collection[str]:
    """Return that no folder is mirrored besides those that `mirror` is given."""
    return ()


def mirror(
    source: str,
    subfolders: Collection[str] = (TEMPLATES,),
    find_more: Callable[[Collection[str], Collection[str]], Collection[str]] = no_subfolders,
) -> Path:
    """Return the local mirror of a folder or file in a store; it lives as long as the process.

    Args:
      source: the address.
      subfolders: of the folder, which are mirrored with all that is in them.
      find_more: returns further ones, from the names of the folder's files and folders.

    Raises:
      UsageError: it is no address.
      InputError: the store has nothing there, or an upload that was not completed.
      MachineError: a package is missing, access is denied, or the store does not answer.
    """
    address = _pinned(Address.parse(source))
    is_file = address.name.endswith(".gguf")
    folder = address.parent if is_file else address
    system = file_system(address)
    with store_errors(folder):
        system.invalidate_cache()
        # Not `find` with a depth, whose walk takes a listing that fails for an empty one.
        entries: list[JsonDict] = system.ls(folder.in_store, detail=True)
        names: dict[str, list[str]] = {"file": [], "directory": []}
        for entry in entries:
            names.setdefault(entry["type"], []).append(PurePosixPath(entry["name"]).name)
        for name in {*subfolders, *find_more(names["file"], names["directory"])}:
            if name in names["directory"]:
                entries += system.find(f"{folder.in_store}/{name}", detail=True).values()
    prefix = f"{folder.in_store}/"
    files = {
        e["name"].removeprefix(prefix): e
        for e in entries
        if e["type"] == "file" and e["name"].startswith(prefix)
    }
    if not files or (is_file and address.name not in files):
        raise InputError("the store has no such folder or file", where=str(address))
    if files.pop(CLAIM_NAME, None) is not None:
        with store_errors(folder):
            claim: bytes = system.cat_file(f"{prefix}{CLAIM_NAME}")
        if claim.startswith(UPLOADING.encode()):
            raise InputError(
                "the upload of this folder is not complete",
                where=str(folder),
                found=CLAIM_NAME,
                hint="wait for it; moecc clean removes an interrupted one",
            )
    top = Path(tempfile.mkdtemp(prefix="moecc-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    # The hub's cache has such a folder; the model card names the model by it.
    model = "--".join(["models", *folder.path.split("/")[:2]])
    local = top / (model if folder.scheme == HUB else folder.scheme) / folder.name
    ALIASES[str(local)] = str(folder)
    for name, entry in files.items():
        path = local / name
        if ".." in path.parts or not name.isprintable() or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = Address(folder.scheme, f"{folder.path}/{name}", folder.revision)
        RANGED[path] = RangedFile(file, system, entry)
    return local / address.name if is_file else local


def _pinned(address: Address) -> Address:
    """Return the address at the commit that its revision names now; others as they are."""
    if address.scheme != HUB:
        return address
    require_package(address)
    from huggingface_hub import HfApi

    name = "/".join(address.path.split("/")[:2])
    with store_errors(address):
        commit = HfApi().model_info(name, revision=address.revision or None).sha
    return Address(HUB, address.path, commit or address.revision)
