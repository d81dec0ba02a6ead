"""Digest files and tensors, and verify a checkpoint against its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from moecc.errors import CheckError, InputError, Problem
from moecc.formats.files import (
    DescriptorPool,
    Identity,
    file_fault,
    is_recordable,
    open_regular,
    read_bounded,
    read_into,
)
from moecc.formats.gguf.header import read_gguf_header
from moecc.formats.gguf.storage import BY_NAME, SUFFIX
from moecc.formats.jsonfile import parse_json
from moecc.formats.modelcard import CARD_NAME
from moecc.formats.safetensors import SHARD_SUFFIX, Header, read_header
from moecc.formats.source import TensorInfo
from moecc.support.problems import Problems, describe, quoted
from moecc.types import DTYPES
from moecc.version import __version__

# ``moecc_manifest.json``: the provenance of a checkpoint, and digests of all its content.
#
# The last line of the file is a seal: the SHA-256 of all bytes before it.  It detects a changed
# bit
# anywhere in a checkpoint, in the manifest as in the weights.

MANIFEST_NAME = "moecc_manifest.json"
SCHEMA = 2
CARD_SCHEMA = 2
"""The first version that records the model card."""

MAX_MANIFEST_BYTES = 256 << 20
_MAX_VALUES = 1 << 22
_STORED = {*DTYPES, *(name.lower() for name in BY_NAME)}
_SEAL = b',\n"seal": "'
_TAIL = b'"\n}\n'


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that the bytes of a conversion may depend on."""
    import platform

    import ml_dtypes
    import numpy as np

    return {
        "moecc": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "ml_dtypes": str(ml_dtypes.__version__),
    }


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A whole file: its size in bytes and the SHA-256 of its content."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightFileRecord:
    """A file of weights: its size in bytes, and the SHA-256 of its header.

    The header is everything before the data, the length included; the data are covered by the
    digests of the tensors, and are hashed only once.
    """

    size_bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor: the SHA-256 of its bytes, its element type (``bf16``), shape and file name."""

    sha256: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
      pipeline: the passes, as a pipeline string.
      seed: of the random numbers.
      source: the last part of the source's path, or its preset.
      source_files: the input files, by name.
      family_from: the family of the source.
      family_to: the family that was written.
      dtype: the requested element type, or ``as stored``.
      preserves: the contract of the pipeline (``exact``, ``reassociation``, or the reason).
      weights: the safetensors files, by name.
      files: the other files, by name, the model card included.
      tensors: by name.
      notes: remarks for readers, e.g. tensors with values that are not finite.
      lineage: where the source was trained, the stages that led to it, the first one first.
      receipt: the receipt of an output that is one file; a folder has it as a file of its own.
      versions: of moecc and the libraries it uses.
      schema: the version of this layout.
    """

    pipeline: str
    seed: int
    source: str
    source_files: Mapping[str, FileRecord]
    family_from: str
    family_to: str
    dtype: str
    preserves: str
    weights: Mapping[str, WeightFileRecord]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    notes: tuple[str, ...] = ()
    lineage: tuple[Mapping[str, object], ...] = ()
    receipt: Mapping[str, object] | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    schema: int = SCHEMA


def dump(manifest: Manifest) -> bytes:
    """Return the content of ``moecc_manifest.json``: one line a tensor, sealed at the end."""
    document = {
        "schema": manifest.schema,
        "versions": dict(manifest.versions),
        "pipeline": manifest.pipeline,
        "seed": manifest.seed,
        "source": manifest.source,
        "source_files": _plain(manifest.source_files),
        "family_from": manifest.family_from,
        "family_to": manifest.family_to,
        "dtype": manifest.dtype,
        "preserves": manifest.preserves,
        "notes": list(manifest.notes),
        **({"lineage": [dict(stage) for stage in manifest.lineage]} if manifest.lineage else {}),
        **({} if manifest.receipt is None else {"receipt": dict(manifest.receipt)}),
        "weights": _plain(manifest.weights),
        "files": _plain(manifest.files),
        "tensors": _plain(manifest.tensors),
    }
    lines = [f"{json.dumps(key)}: {_layout(value)}" for key, value in document.items()]
    return seal(("{\n" + ",\n".join(lines)).encode())


def manifest_beside(file: Path) -> Path:
    """Return the manifest of an output that is one file."""
    return file.with_name(f"{file.name}.moecc.json")


def manifest_of(place: Path) -> Path:
    """Return the manifest of an output, a folder or one file."""
    return place / MANIFEST_NAME if place.is_dir() else manifest_beside(place)


def load(place: Path) -> Manifest:
    """Read the manifest of an output, a folder or one file.

    Raises:
      InputError: there is none, or another version of moecc wrote it; all problems at once.
      CheckError: it differs from what moecc wrote.
      MachineError: it cannot be read.
    """
    path = manifest_of(place)
    if not path.is_file():
        hint = "only what moecc wrote can be verified against a manifest"
        raise InputError(f"there is no {path.name}", where=str(place), hint=hint)
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest by its own name. Raises as `load`."""
    if fault := file_fault(path, path.parent):
        raise InputError((fault,))
    data = read_bounded(path, MAX_MANIFEST_BYTES)
    content = data[: max(0, data.rfind(_SEAL))]
    if seal(content) != data:
        what = "the manifest was changed after it was written: its seal does not match its content"
        raise CheckError(what, where=str(path), hint="fetch the file again")
    document = parse_json(data, str(path), max_values=_MAX_VALUES)
    return _Reader(_of_known_schema(document, str(path)), str(path)).manifest()


def _of_known_schema(document: object, where: str) -> dict[str, object]:
    """Return the document, or raise InputError if it is none that this moecc reads."""
    found = document if isinstance(document, dict) else {}
    schema = found.get("schema")
    if type(schema) is int and 1 <= schema <= SCHEMA:
        return found
    raise InputError(
        "the manifest is of a version that this moecc does not read",
        where=where,
        expected=f'"schema": {SCHEMA}, or an earlier one',
        found=describe(schema),
    )


def seal(content: bytes) -> bytes:
    """Append the seal line to the content of a manifest."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + _TAIL


def _plain(
    records: Mapping[str, FileRecord | WeightFileRecord | TensorRecord],
) -> dict[str, object]:
    return {
        name: {key: getattr(record, key) for key in record.__slots__}
        for name, record in sorted(records.items())
    }


def _layout(value: object) -> str:
    """Print a value on one line, or a mapping of records with one line each."""
    if not isinstance(value, dict) or not any(isinstance(v, dict) for v in value.values()):
        return json.dumps(value)
    lines = (f" {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


class _Reader:
    """Checks the fields of a manifest one by one, and collects every problem."""

    def __init__(self, document: dict[str, object], where: str) -> None:
        self.document = document
        self.where = where
        self.problems = Problems()

    def manifest(self) -> Manifest:
        """Return the manifest, or raise with all its problems."""
        self._refuse_strange_keys()
        weights = self._weights()
        made = Manifest(
            pipeline=self._text("pipeline"),
            seed=self._integer(self.document.get("seed"), "seed"),
            source=self._text("source"),
            source_files=self._files("source_files"),
            family_from=self._text("family_from"),
            family_to=self._text("family_to"),
            dtype=self._text("dtype"),
            preserves=self._text("preserves"),
            weights=weights,
            files=self._files("files"),
            tensors=self._tensors(weights),
            notes=self._notes(),
            lineage=self._lineage(),
            receipt=self._receipt(),
            versions=self._versions(),
            schema=self._integer(self.document.get("schema"), "schema"),
        )
        self.problems.raise_if_any(InputError)
        return made

    def _refuse_strange_keys(self) -> None:
        known = {item.name for item in fields(Manifest)} | {"seal"}
        for key in self.document.keys() - known:
            self.problems.add(f"the manifest has an unknown key {quoted(key)}", where=self.where)

    def _wrong(self, key: str, expected: str, found: object) -> None:
        what = f"the manifest's {quoted(key)} is wrong"
        self.problems.add(what, where=self.where, expected=expected, found=describe(found))

    def _text(self, key: str) -> str:
        value = self.document.get(key)
        return value if isinstance(value, str) else self._no_text(key, value)

    def _no_text(self, key: str, value: object) -> str:
        self._wrong(key, "a string", value)
        return ""

    def _integer(self, value: object, key: str, *, least: int | None = None) -> int:
        if type(value) is int and (least is None or value >= least):
            return value
        self._wrong(key, "a whole number", value)
        return 0

    def _sha256(self, value: object, key: str) -> str:
        digits = set(value) if isinstance(value, str) else set()
        if isinstance(value, str) and len(value) == 64 and digits <= set("0123456789abcdef"):
            return value
        self._wrong(key, "64 hexadecimal digits", value)
        return ""

    def _records(self, key: str, names: tuple[str, ...]) -> dict[str, dict[str, object]]:
        """Return the entries of a mapping that have exactly the fields of their record."""
        value = self.document.get(key)
        if not isinstance(value, dict):
            self._wrong(key, "an object", value)
            return {}
        usable = {}
        for name, item in value.items():
            if isinstance(item, dict) and item.keys() == set(names):
                usable[name] = item
            else:
                self._wrong(f"{key}.{name}", f"an object with {', '.join(names)}", item)
        return usable

    def _files(self, key: str) -> dict[str, FileRecord]:
        records = {}
        for name, item in self._records(key, FileRecord.__slots__).items():
            self._require_inside(name, key)
            size = self._integer(item["size_bytes"], f"{key}.{name}", least=0)
            records[name] = FileRecord(size, self._sha256(item["sha256"], f"{key}.{name}"))
        return records

    def _weights(self) -> dict[str, WeightFileRecord]:
        records = {}
        for name, item in self._records("weights", WeightFileRecord.__slots__).items():
            self._require_inside(name, "weights")
            place = f"weights.{name}"
            size = self._integer(item["size_bytes"], place, least=0)
            records[name] = WeightFileRecord(size, self._sha256(item["header_sha256"], place))
        return records

    def _tensors(self, weights: Collection[str]) -> dict[str, TensorRecord]:
        records = {}
        for name, item in self._records("tensors", TensorRecord.__slots__).items():
            place = f"tensors.{name}"
            digest = self._sha256(item["sha256"], place)
            dtype = self._one_of(item["dtype"], _STORED, "an element type of moecc", place)
            file = self._one_of(item["file"], weights, "a weight file", place)
            records[name] = TensorRecord(digest, dtype, self._shape(item["shape"], place), file)
        return records

    def _one_of(self, value: object, known: Collection[str], expected: str, place: str) -> str:
        if isinstance(value, str) and value in known:
            return value
        self._wrong(place, expected, value)
        return ""

    def _shape(self, value: object, place: str) -> tuple[int, ...]:
        if isinstance(value, list):
            return tuple(self._integer(size, place, least=0) for size in value)
        self._wrong(place, "a list of sizes", value)
        return ()

    def _notes(self) -> tuple[str, ...]:
        value = self.document.get("notes")
        if isinstance(value, list) and all(isinstance(note, str) for note in value):
            return tuple(value)
        self._wrong("notes", "a list of strings", value)
        return ()

    def _lineage(self) -> tuple[Mapping[str, object], ...]:
        value = self.document.get("lineage", [])
        if isinstance(value, list) and all(isinstance(stage, dict) for stage in value):
            return tuple(value)
        self._wrong("lineage", "a list of objects", value)
        return ()

    def _receipt(self) -> dict[str, object] | None:
        value = self.document.get("receipt")
        if value is None or isinstance(value, dict):
            return value
        self._wrong("receipt", "an object", value)
        return None

    def _versions(self) -> dict[str, str]:
        value = self.document.get("versions")
        if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
            return value
        self._wrong("versions", "an object of strings", value)
        return {}

    def _require_inside(self, name: str, key: str) -> None:
        """Report a file name that points outside the folder."""
        if not is_recordable(name):
            self._wrong(key, "names of files in the folder", name)


# Size and SHA-256 of files, by threads of their own, also beside other work.

HASH_THREADS = 2
CHUNK_BYTES = 1 << 20
"""What is read at once: it should still be in the cache of the core when it is hashed."""

_local = threading.local()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal, in constant memory.

    Raises:
      InputError: there is no such regular file.
      MachineError: it cannot be read.
    """
    return _file_record(path, threading.Event()).sha256


def file_records(files: Mapping[str, Path] | Iterable[Path]) -> dict[str, FileRecord]:
    """Return size and digest of files, by the given names or by file name; uses two threads.

    Raises: as `file_digest`.
    """
    with hashed_beside(files) as records:
        return records()


@contextmanager
def hashed_beside(
    files: Mapping[str, Path] | Iterable[Path],
) -> Iterator[Callable[[], dict[str, FileRecord]]]:
    """Begin to hash files; yield what waits for size and digest of each, by name.

    What is yielded raises as `file_digest`.  On the way out, hashing that nobody waits for ends.
    """
    named = dict(files) if isinstance(files, Mapping) else {path.name: path for path in files}
    stop = threading.Event()
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        hashed = {name: threads.submit(_file_record, path, stop) for name, path in named.items()}
        try:
            yield lambda: {name: one.result() for name, one in hashed.items()}
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)


def chunk_buffer() -> memoryview:
    """Return this thread's own buffer of one chunk."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(CHUNK_BYTES))
    buffer: memoryview = _local.buffer
    return buffer


def range_digest(
    descriptor: int, end_bytes: int, path: Path, stop: threading.Event | None = None
) -> str:
    """Return the SHA-256 of the first bytes of a file. Raises CancelledError after `stop`."""
    digest = hashlib.sha256()
    buffer = chunk_buffer()
    for done in range(0, end_bytes, CHUNK_BYTES):
        if stop is not None and stop.is_set():
            raise CancelledError
        part = buffer[: min(CHUNK_BYTES, end_bytes - done)]
        read_into(descriptor, part, done, path)
        digest.update(part)
    return digest.hexdigest()


def _file_record(path: Path, stop: threading.Event) -> FileRecord:
    descriptor, identity = open_regular(path)
    try:
        digest = range_digest(descriptor, identity.size_bytes, path, stop)
        return FileRecord(identity.size_bytes, digest)
    finally:
        os.close(descriptor)


__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "FileRecord",
    "Manifest",
    "TensorRecord",
    "WeightFileRecord",
    "check_manifest",
    "dump",
    "file_digest",
    "file_records",
    "hashed_beside",
    "library_versions",
    "load",
    "seal",
    "verify_manifest",
    "weight_file_record",
]


def weight_file_record(path: Path) -> WeightFileRecord:
    """Return size and header digest of a file of weights. Raises as its reader."""
    return _weight_record(path, _header(path))


def _header(path: Path) -> Header:
    """Return the header of a safetensors or GGUF file, with the names and types in it."""
    if path.suffix != SUFFIX:
        return read_header(path)
    found = read_gguf_header(path)
    tensors = {
        name: TensorInfo(
            name, t.storage.dtype, t.shape, t.nbytes, path, t.offset,
            t.storage.name if t.storage.is_quantised else "",
        )
        for name, t in found.tensors.items()
    }  # fmt: skip
    return Header(tensors, {}, found.data_start_bytes, found.identity)


def verify_manifest(place: Path, *, allow_edited_card: bool = False) -> list[Problem]:
    """Compare a folder or a GGUF file with its manifest, every byte of every file included.

    Args:
      place: the folder, or the GGUF file; in a folder, files of Git and the Hub's ``.cache`` do
        not count.
      allow_edited_card: whether the model card may differ from the one that was written.

    Returns:
      One problem for each tensor and file that is missing, extra or different; empty if all is
      well.

    Raises:
      InputError: there is no manifest, or one of another version.
      MachineError: a file cannot be read.
    """
    try:
        manifest = load(place)
    except CheckError as error:
        return list(error.problems)
    return _Verification(place, manifest, allow_edited_card).problems()


def check_manifest(place: Path, *, allow_edited_card: bool = False) -> None:
    """Raise CheckError with all problems that `verify_manifest` finds; otherwise raises as it."""
    if problems := verify_manifest(place, allow_edited_card=allow_edited_card):
        raise CheckError(problems)


class _Verification:
    """One comparison of a folder, or of one file, with its manifest."""

    def __init__(self, place: Path, manifest: Manifest, allow_edited_card: bool) -> None:
        self.one_file = None if place.is_dir() else place
        self.folder = place if place.is_dir() else place.parent
        self.manifest = manifest
        self.free = {CARD_NAME} if allow_edited_card else set()
        self.found = Problems(limit=sys.maxsize)  # every tensor is named
        self.pool = DescriptorPool()
        self.identities: dict[Path, Identity] = {}

    def problems(self) -> list[Problem]:
        """Return all differences."""
        self._files()
        headers = self._headers()
        self._added()
        comparable = self._tensors(headers)
        try:
            self._digests(comparable)
        finally:
            self.pool.close()
        return self.found.listed()

    def _path(self, name: str) -> Path:
        return self.one_file or self.folder / name

    def _usable(self, name: str) -> bool:
        path = self._path(name)
        if not os.path.lexists(path):
            what = f"the file {quoted(name)} is missing"
            self.found.add(what, where=str(self.folder))
            return False
        if fault := file_fault(path, self.folder):
            self.found.extend((fault,))
            return False
        return True

    def _files(self) -> None:
        names = [name for name in self.manifest.files if self._usable(name)]
        found = file_records({name: self._path(name) for name in names})
        for name in names:
            if name in self.free:
                continue
            self._compare(name, self.manifest.files[name].sha256, found[name].sha256)

    def _compare(self, name: str, expected: str, found: str, part: str = "the file") -> None:
        if expected != found:
            what = f"{part} differs from the one that moecc wrote"
            where = str(self._path(name))
            self.found.add(what, where=where, expected=f"sha256 {expected}", found=found)

    def _headers(self) -> dict[str, Header]:
        headers = {}
        for name, record in self.manifest.weights.items():
            path = self._path(name)
            if not self._usable(name):
                continue
            try:
                header = _header(path)
            except InputError as error:
                self.found.extend(error.problems)
                continue
            headers[name] = header
            self.identities[path] = header.identity
            found = _weight_record(path, header)
            self._compare(name, record.header_sha256, found.header_sha256, "the header")
        return headers

    def _added(self) -> None:
        known = {MANIFEST_NAME, *self.manifest.weights, *self.manifest.files}
        if self.manifest.schema < CARD_SCHEMA:
            known.add(CARD_NAME)
        found = set(_files_in(self.folder)) if self.one_file is None else set()
        for name in sorted(found - known):
            kind = "weight file" if name.endswith((SHARD_SUFFIX, SUFFIX)) else "file"
            what = f"the {kind} {quoted(name)} is not in the manifest"
            self.found.add(what, where=str(self.folder), hint="move it out of the folder")

    def _tensors(self, headers: dict[str, Header]) -> list[TensorInfo]:
        """Compare names, types and shapes; return the tensors whose bytes can be compared."""
        for file, header in headers.items():
            for name in header.tensors.keys() - self.manifest.tensors.keys():
                what = f"the tensor {quoted(name)} is not in the manifest"
                self.found.add(what, where=str(self._path(file)))
        comparable = []
        for name, record in self.manifest.tensors.items():
            where = str(self._path(record.file))
            home = headers.get(record.file)
            info = home.tensors.get(name) if home else None
            if info is None:
                reason = "is missing" if home else "cannot be checked: its file is unusable"
                self.found.add(
                    f"the tensor {quoted(name)} {reason}", where=str(self._path(record.file))
                )
            elif (stored_name(info), info.shape) != (record.dtype, record.shape):
                self.found.add(
                    f"the tensor {quoted(name)} has another type or shape",
                    where=where,
                    expected=f"{record.dtype} {list(record.shape)}",
                    found=f"{stored_name(info)} {list(info.shape)}",
                )
            else:
                comparable.append(info)
        return comparable

    def _digests(self, tensors: list[TensorInfo]) -> None:
        """Hash the bytes of tensors, in their order on disk."""
        ordered = sorted(tensors, key=lambda info: (info.file, info.offset))
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            for info, found in zip(ordered, threads.map(self._digest, ordered), strict=True):
                expected = self.manifest.tensors[info.name].sha256
                if isinstance(found, InputError):
                    self.found.extend(found.problems)
                elif found != expected:
                    self.found.add(
                        f"the data of the tensor {quoted(info.name)} differ from what moecc wrote",
                        where=str(info.file),
                        expected=f"sha256 {expected}",
                        found=found,
                    )

    def _digest(self, info: TensorInfo) -> str | InputError:
        digest = hashlib.sha256()
        buffer = chunk_buffer()
        try:
            for done in range(0, info.nbytes, CHUNK_BYTES):
                part = buffer[: min(CHUNK_BYTES, info.nbytes - done)]
                self.pool.read_into(info.file, self.identities[info.file], part, info.offset + done)
                digest.update(part)
        except InputError as error:
            return error
        return digest.hexdigest()


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the paths in a folder of whatever is no folder; links are not followed."""
    for path, folders, names in os.walk(folder):
        inside = Path(path).relative_to(folder)
        if path == str(folder):
            folders[:] = [name for name in folders if name != ".cache" and not _is_git(name)]
            names = [name for name in names if not _is_git(name)]
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        yield from ((inside / name).as_posix() for name in (*names, *links))


def _is_git(name: str) -> bool:
    return name.startswith(".git")


def stored_name(info: TensorInfo) -> str:
    """Return the type of a tensor in its file, ``bf16`` or ``q8_0``."""
    return info.storage.lower() or info.dtype.name


def _weight_record(path: Path, header: Header) -> WeightFileRecord:
    descriptor, identity = open_regular(path)
    try:
        digest = range_digest(descriptor, header.data_start_bytes, path)
    finally:
        os.close(descriptor)
    return WeightFileRecord(identity.size_bytes, digest)
