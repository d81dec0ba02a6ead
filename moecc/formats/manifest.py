"""Digest files and tensors, and verify a checkpoint against its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from moecc.errors import (
    CheckError,
    InputError,
    MoeccError,
    Problem,
    Problems,
    describe,
    quoted,
    raise_problems,
)
from moecc.formats.files import (
    RANGED,
    DescriptorPool,
    Identity,
    check_file,
    file_fault,
    identify,
    is_recordable,
    opened_regular,
    range_digest,
    read_bounded,
    read_into,
    replace_durable,
)
from moecc.formats.gguf.storage import BY_NAME, SUFFIX
from moecc.formats.modelcard import CARD_NAME
from moecc.formats.safetensors import SHARD_SUFFIX, Header, read_header
from moecc.formats.source import TensorInfo
from moecc.support.documents import MAX_VALUES, parse_json
from moecc.support.record import Check, Count, Sha256, read_record, stored, to_json
from moecc.support.text import MOST_PER_KIND, amount, capped
from moecc.support.untyped import Json, JsonDict
from moecc.types import DTYPES
from moecc.version import __version__

# ``moecc_manifest.json``: the provenance of a checkpoint, and digests of all its content.
#
# The last line of the file is a seal, the SHA-256 of all bytes before it.  It detects a changed
# bit anywhere in a checkpoint, in the manifest as in the weights.

MANIFEST_NAME = "moecc_manifest.json"
SCHEMA = 2
CARD_SCHEMA = 2
"""The first version that records the model card."""

MAX_MANIFEST_BYTES = 256 << 20
_MAX_VALUES = 1 << 22
_STORED_TYPES = {*DTYPES, *(name.lower() for name in BY_NAME)}
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
    """A file: its size in bytes and the SHA-256 of its content."""

    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class WeightFileRecord:
    """A file of weights: its size in bytes, and the SHA-256 of its header.

    The header is everything before the data, the length included; the data are covered by the
    digests of the tensors, and are hashed only once.
    """

    size_bytes: Count
    header_sha256: Sha256


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor: the SHA-256 of its bytes, its element type (``bf16``), shape and file name."""

    sha256: Sha256
    dtype: Annotated[str, Check(_STORED_TYPES.__contains__, "an element type of moecc")]
    shape: tuple[Count, ...]
    file: str


FileName = Annotated[str, Check(is_recordable, "a name of a file in the folder")]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a manifest.

    Attributes:
      schema: the version of this layout.
      versions: the versions of moecc and the libraries it uses.
      pipeline: the passes, as a pipeline string.
      seed: the seed of the random numbers.
      source: the name of the source, on the Hub, of its folder or file, or its preset.
      base_model: the models on the Hub that it was made from, as far as they are known.
      source_files: the input files, by name.
      family_from: the family of the source.
      family_to: the family that was written.
      dtype: the requested element type, or ``as stored``.
      preserves: the contract of the pipeline (``exact``, ``reassociation``, or the reason).
      notes: remarks for readers, e.g. tensors with values that are not finite.
      lineage: the stages that led to the source, the first one first.
      receipt: the receipt of an output that is one file; a folder has it as a file of its own.
      weights: the files of weights, by name.
      files: the other files, by name, the model card included.
      tensors: the tensors, by name.
    """

    schema: int = SCHEMA
    versions: Mapping[str, str] = field(
        default_factory=library_versions, metadata=stored(required=True)
    )
    pipeline: str
    # Any whole number: seeds may have more than 64 bits.
    seed: Annotated[Any, Check(lambda seed: type(seed) is int, "a whole number")]
    source: str
    source_files: Mapping[FileName, FileRecord]
    family_from: str
    family_to: str
    dtype: str
    preserves: str
    notes: tuple[str, ...] = field(default=(), metadata=stored(required=True))
    base_model: tuple[str, ...] = field(default=(), metadata=stored(omit_default=True))
    lineage: tuple[Json, ...] = field(default=(), metadata=stored(omit_default=True))
    receipt: Json | None = field(default=None, metadata=stored(omit_default=True))
    weights: Mapping[FileName, WeightFileRecord]
    files: Mapping[FileName, FileRecord]
    tensors: Mapping[str, TensorRecord]


def folder_records(
    folder: Path,
    tensors: Mapping[str, TensorRecord],
    *,
    unlisted: Collection[str] = (),
    is_flat: bool = False,
) -> tuple[dict[str, WeightFileRecord], dict[str, FileRecord]]:
    """Return the records of the files of `tensors` in a folder, and of all its other files.

    Args:
      folder: the folder; an earlier manifest in it is not listed.
      tensors: the tensors that were written.
      unlisted: names of further files that are not listed.
      is_flat: whether what folders in it hold is not listed, either.
    """
    weights = sorted({tensor.file for tensor in tensors.values()})
    skipped = {MANIFEST_NAME, *weights, *unlisted}
    below = folder.glob("*" if is_flat else "**/*")
    names = sorted(p.relative_to(folder).as_posix() for p in below if p.is_file())
    return (
        {name: weight_file_record(folder / name) for name in weights},
        file_records({name: folder / name for name in names if name not in skipped}),
    )


def dump(manifest: Manifest) -> bytes:
    """Return the content of ``moecc_manifest.json``: one line a tensor, sealed at the end."""
    document = to_json(manifest)
    for key in ("source_files", "weights", "files", "tensors"):
        document[key] = dict(sorted(document[key].items()))
    lines = [f"{json.dumps(key)}: {_layout(value)}" for key, value in document.items()]
    return seal(("{\n" + ",\n".join(lines)).encode())


def _layout(value: object) -> str:
    """Print a value on one line, or a mapping of records with one line each."""
    if not isinstance(value, dict) or not any(isinstance(v, dict) for v in value.values()):
        return json.dumps(value)
    lines = (f" {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def seal(content: bytes) -> bytes:
    """Append the seal line to the content of a sealed file, all but its last brace."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + _TAIL


def read_sealed(
    path: Path, limit_bytes: int, error: type[MoeccError], hint: str, max_values: int = MAX_VALUES
) -> JsonDict:
    """Return the content of a sealed JSON file without its seal.

    Raises:
      MoeccError: as `error`, the content does not have the digest of its seal.
      InputError: it is missing, or not JSON.
      MachineError: it cannot be read.
    """
    data = read_bounded(path, limit_bytes)
    if seal(data[: max(0, data.rfind(_SEAL))]) != data:
        raise error(
            f"{path.name} was changed after it was written: its seal does not match its content",
            where=path,
            hint=hint,
        )
    document = parse_json(data, str(path), max_values=max_values)
    assert isinstance(document, dict), "it ends with a member and a brace"
    del document["seal"]
    return document


def manifest_beside(file: Path) -> Path:
    """Return the manifest of an output that is one file."""
    return file.with_name(f"{file.name}.moecc.json")


def load(output: Path) -> Manifest:
    """Read the manifest of an output, a folder or one file.

    Raises:
      InputError: there is none, or another version of moecc wrote it; all problems at once.
      CheckError: it differs from what moecc wrote.
      MachineError: it cannot be read.
    """
    path = output / MANIFEST_NAME if output.is_dir() else manifest_beside(output)
    if not path.is_file():
        hint = "only what moecc wrote can be verified against a manifest"
        raise InputError(f"there is no {path.name}", where=output, hint=hint)
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest by its own name. Raises as `load`."""
    check_file(path, path.parent)
    hint = "fetch the file again"
    document = read_sealed(path, MAX_MANIFEST_BYTES, CheckError, hint, _MAX_VALUES)
    manifest = read_record(Manifest, document, str(path), versions=range(1, SCHEMA + 1))
    problems = Problems()
    for name, tensor in manifest.tensors.items():
        if tensor.file not in manifest.weights:
            where = f"{path}: tensors.{name}.file"
            problems.add("no weight file", where=where, found=describe(tensor.file))
    problems.raise_if_any()
    return manifest


# Size and SHA-256 of files, by threads of their own, also beside other work.

HASH_THREADS = 2


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
            yield lambda: {name: record.result() for name, record in hashed.items()}
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)


def _file_record(path: Path, stop: threading.Event) -> FileRecord:
    if path in RANGED and (stated := RANGED[path].sha256):
        return FileRecord(RANGED[path].identity.size_bytes, stated)
    with opened_regular(path) as (descriptor, identity):
        read = partial(read_into, descriptor, path=path)
        return FileRecord(identity.size_bytes, range_digest(read, 0, identity.size_bytes, stop))


def weight_file_record(path: Path) -> WeightFileRecord:
    """Return size and header digest of a file of weights. Raises as its reader."""
    return _weight_record(path, _header(path))


def _header(path: Path) -> Header:
    """Return the header of a safetensors or GGUF file, with the names and types in it."""
    if path.suffix != SUFFIX:
        return read_header(path)
    from moecc.formats.gguf.header import read_gguf_header

    header = read_gguf_header(path)
    tensors = {
        name: TensorInfo(
            name,
            t.storage.dtype,
            t.shape,
            t.nbytes,
            path,
            t.offset,
            t.storage.name if t.storage.is_quantised else "",
        )
        for name, t in header.tensors.items()
    }
    return Header(tensors, {}, header.data_start_bytes, header.identity)


def verify_manifest(output: Path, *, allow_edited_card: bool = False) -> list[Problem]:
    """Compare a folder or a GGUF file with its manifest, every byte of every file included.

    Args:
      output: the folder, or the GGUF file; in a folder, files of Git and the Hub's ``.cache`` do
        not count.
      allow_edited_card: whether the model card may differ from the one that was written.

    Returns:
      One problem for each file and, up to a number, each tensor that is missing, extra or
      different; empty if all is well.

    Raises:
      InputError: there is no manifest, or one of another version.
      MachineError: a file cannot be read.
    """
    try:
        manifest = load(output)
    except CheckError as error:
        return list(error.problems)
    return _Verification(output, manifest, allow_edited_card).problems()


def conversion_of(output: Path, files: Mapping[str, Path]) -> Manifest | None:
    """Return the manifest of an output that was converted from `files`, byte for byte.

    None stands for an output without a manifest, and for one of other files. All bytes of both are
    hashed: the name of a file, its size or its header do not tell what its weights are.

    Args:
      output: a folder, or a GGUF file.
      files: the files of a checkpoint, by name; the conversion may have read further ones.

    Raises:
      CheckError: the output was changed since.
      InputError: another version of moecc wrote the manifest.
      MachineError: a file cannot be read.
    """
    path = output / MANIFEST_NAME if output.is_dir() else manifest_beside(output)
    if not files or not path.is_file():
        return None
    manifest = read_manifest(path)
    records = {name: manifest.source_files.get(name) for name in files}
    for name, record in records.items():
        if record is None or record.size_bytes != identify(files[name]).size_bytes:
            return None
    if file_records(files) != records:
        return None
    check_manifest(output, allow_edited_card=True)
    return manifest


def check_manifest(output: Path, *, allow_edited_card: bool = False) -> None:
    """Raise CheckError with all problems that `verify_manifest` finds; otherwise raises as it."""
    raise_problems(verify_manifest(output, allow_edited_card=allow_edited_card), CheckError)


def with_card(manifest: Manifest, card: bytes) -> Manifest:
    """Return the manifest of a folder with another model card."""
    record = FileRecord(len(card), hashlib.sha256(card).hexdigest())
    return replace(manifest, files={**manifest.files, CARD_NAME: record})


def record_card(folder: Path) -> None:
    """State the model card of a folder in its manifest as it is now, edited after the conversion.

    Raises: as `load`; MachineError if the manifest cannot be written.
    """
    manifest, card = load(folder), folder / CARD_NAME
    if not card.is_file():
        return
    edited = with_card(manifest, card.read_bytes())
    if edited != manifest:
        replace_durable(folder / MANIFEST_NAME, dump(edited))


TRAINED = (
    "if it was trained since, moecc verify {} --against SOURCE measures how far it went; "
    "a manifest is of the weights that moecc wrote"
)
"""The way out where most tensors have other values."""


class _Verification:
    """One comparison of a folder, or of one file, with its manifest."""

    def __init__(self, output: Path, manifest: Manifest, allow_edited_card: bool) -> None:
        self._single_file = None if output.is_dir() else output
        self._folder = output if output.is_dir() else output.parent
        self._manifest = manifest
        self._editable = {CARD_NAME} if allow_edited_card else set()
        self._problems = Problems(limit=sys.maxsize)
        self._pool = DescriptorPool()
        self._identities: dict[Path, Identity] = {}

    def problems(self) -> list[Problem]:
        """Return all differences."""
        self._files()
        headers = self._headers()
        self._added()
        comparable: list[TensorInfo] = []
        unlike = self._tensors(headers, comparable)
        self._problems.extend(capped(unlike, "tensor differs so", "tensors differ so"))
        try:
            changed = list(self._digests(comparable))
        finally:
            self._pool.close()
        most = MOST_PER_KIND
        if len(changed) > max(1, len(comparable) // 2):
            output = quote(str(self._single_file or self._folder))
            changed[0] = replace(changed[0], hint=TRAINED.format(output))
            most = 3
        self._problems.extend(capped(changed, "tensor differs so", "tensors differ so", most))
        return self._problems.listed()

    def _path(self, name: str) -> Path:
        return self._single_file or self._folder / name

    def _usable(self, name: str) -> bool:
        path = self._path(name)
        if not os.path.lexists(path):
            count = sum(t.file == name for t in self._manifest.tensors.values())
            of = f", with {amount(count, 'tensor')}" if count else ""
            hint = "fetch the file again" if count else None
            message = f"the file {quoted(name)} is missing{of}"
            self._problems.add(message, where=self._folder, hint=hint)
            return False
        if fault := file_fault(path, self._folder):
            self._problems.extend((fault,))
            return False
        return True

    def _files(self) -> None:
        names = [name for name in self._manifest.files if self._usable(name)]
        records = file_records({name: self._path(name) for name in names})
        for name in names:
            if name in self._editable:
                continue
            self._compare(name, self._manifest.files[name].sha256, records[name].sha256)

    def _compare(self, name: str, expected: str, actual: str, part: str = "the file") -> None:
        if expected != actual:
            fault = f"{part} differs from the one that moecc wrote"
            where = self._path(name)
            hint = "--allow-edited-card accepts an edited card" if name == CARD_NAME else None
            self._problems.add(
                fault, where=where, expected=f"sha256 {expected}", found=actual, hint=hint
            )

    def _headers(self) -> dict[str, Header]:
        headers = {}
        for name, record in self._manifest.weights.items():
            path = self._path(name)
            if not self._usable(name):
                continue
            with self._problems:
                header = headers[name] = _header(path)
                self._identities[path] = header.identity
                actual = _weight_record(path, header)
                self._compare(name, record.header_sha256, actual.header_sha256, "the header")
        return headers

    def _added(self) -> None:
        listed = {MANIFEST_NAME, *self._manifest.weights, *self._manifest.files}
        if self._manifest.schema < CARD_SCHEMA:
            listed.add(CARD_NAME)
        present = set(_files_in(self._folder)) if self._single_file is None else set()
        for name in sorted(present - listed):
            kind = "weight file" if name.endswith((SHARD_SUFFIX, SUFFIX)) else "file"
            fault = f"the {kind} {quoted(name)} is not in the manifest"
            self._problems.add(fault, where=self._folder, hint="move it out of the folder")

    def _tensors(
        self, headers: dict[str, Header], comparable: list[TensorInfo]
    ) -> Iterator[Problem]:
        """Compare names, types and shapes; collect the tensors whose bytes can be compared."""
        for file, header in headers.items():
            for name in header.tensors.keys() - self._manifest.tensors.keys():
                fault = f"the tensor {quoted(name)} is not in the manifest"
                yield Problem(fault, str(self._path(file)))
        for name, record in self._manifest.tensors.items():
            where = str(self._path(record.file))
            if (home := headers.get(record.file)) is None:
                continue  # of the file there is a problem
            if (info := home.tensors.get(name)) is None:
                yield Problem(f"the tensor {quoted(name)} is missing", where)
            elif (stored_name(info), info.shape) != (record.dtype, record.shape):
                yield Problem(
                    f"the tensor {quoted(name)} has another type or shape",
                    where,
                    expected=f"{record.dtype} {list(record.shape)}",
                    found=f"{stored_name(info)} {list(info.shape)}",
                )
            else:
                comparable.append(info)

    def _digests(self, tensors: list[TensorInfo]) -> Iterator[Problem]:
        """Hash the bytes of tensors, in their order on disk."""
        ordered = sorted(tensors, key=lambda info: (info.file, info.offset))
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            for info, digest in zip(ordered, threads.map(self._digest, ordered), strict=True):
                expected = self._manifest.tensors[info.name].sha256
                if isinstance(digest, InputError):
                    yield from digest.problems
                elif digest != expected:
                    yield Problem(
                        f"the data of the tensor {quoted(info.name)} differ from what moecc wrote",
                        str(info.file),
                        expected=f"sha256 {expected}",
                        found=digest,
                    )

    def _digest(self, info: TensorInfo) -> str | InputError:
        read = partial(self._pool.read_into, info.file, self._identities[info.file])
        try:
            return range_digest(read, info.offset, info.nbytes)
        except InputError as error:
            return error


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
    with opened_regular(path) as (descriptor, identity):
        read = partial(read_into, descriptor, path=path)
        digest = range_digest(read, 0, header.data_start_bytes)
    return WeightFileRecord(identity.size_bytes, digest)
