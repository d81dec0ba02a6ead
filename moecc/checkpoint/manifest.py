"""Digest files and tensors, and verify a checkpoint against its manifest."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moecc.checkpoint.files import (
    DescriptorPool,
    Identity,
    file_fault,
    open_regular,
)
from moecc.checkpoint.frontmatter import CARD_NAME
from moecc.checkpoint.gguf.header import read_gguf_header
from moecc.checkpoint.gguf.storage import SUFFIX
from moecc.checkpoint.hashing import (
    CHUNK_BYTES,
    HASH_THREADS,
    chunk_buffer,
    file_digest,
    file_records,
    hashed_beside,
    range_digest,
)
from moecc.checkpoint.index import SHARD_SUFFIX
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.records import (
    CARD_SCHEMA,
    MANIFEST_NAME,
    SCHEMA,
    FileRecord,
    Manifest,
    TensorRecord,
    WeightFileRecord,
    dump,
    library_versions,
    load,
    seal,
)
from moecc.checkpoint.safetensors import Header, read_header
from moecc.checkpoint.source import TensorInfo
from moecc.errors import CheckError, InputError, Problem

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
