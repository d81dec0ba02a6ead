"""A strict reader of safetensors headers.

The format is eight bytes of length N, N bytes of JSON, and one buffer of data that the tensors
cover without gap or overlap (the README of the safetensors project is its specification).  The
usual parser is laxer: it accepts duplicate names, stray fields and unreadable shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import TypeVar

from moecc.errors import InputError, Problems, UsageError, describe, nearest, quoted
from moecc.formats.files import (
    MAX_SIZE,
    SNIFFED_BYTES,
    DataSpan,
    Identity,
    check_file,
    check_layout,
    json_content,
    name_fault,
    opened_regular,
    read_into,
    read_json_object,
    sniff,
)
from moecc.formats.gguf.storage import Storage
from moecc.formats.source import TensorInfo
from moecc.support.documents import parse_json
from moecc.support.process import gc_paused
from moecc.support.text import amount
from moecc.support.untyped import JsonDict
from moecc.types import BY_SAFETENSORS, DType, Shape

T = TypeVar("T")

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1 << 18
MAX_RANK = 64
_LENGTH_BYTES = 8
# A header longer than this per tensor is an attack on the reader, not a header.
_FREE_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 16 << 20, 512
_FREE_VALUES, _VALUES_PER_TENSOR = 1 << 20, 16
_FIELDS = {"dtype", "shape", "data_offsets"}
_SUB_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}
_LONGEST_DTYPE = 20
_UNSUPPORTED = {"F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
      tensors: the tensors by name, in the order of the header.
      metadata: the strings under ``__metadata__``.
      data_start_bytes: the offset of the buffer in the file.
      identity: the state of the file when its header was read.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start_bytes: int
    identity: Identity


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
      InputError: with all problems of the header.
      MachineError: the file cannot be read.
    """
    with opened_regular(path) as (descriptor, identity):
        raw = _read_raw(descriptor, identity.size_bytes, path)
    with gc_paused():
        return _HeaderCheck(path, len(raw), identity).header(_parse(raw, path))


def _read_raw(descriptor: int, size_bytes: int, path: Path) -> bytearray:
    head = bytearray(min(SNIFFED_BYTES, size_bytes))
    read_into(descriptor, memoryview(head), 0, path)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    hint: str | None = "the download may be incomplete; fetch the file again"
    if size_bytes < _LENGTH_BYTES:
        fault = "the file is too small to have a header", "8 bytes or more", f"{size_bytes} bytes"
    elif length > MAX_HEADER_BYTES:
        expected = f"at most {MAX_HEADER_BYTES:,} bytes of header"
        fault = "the header is too long", expected, f"{length:,} bytes"
    elif length > size_bytes - _LENGTH_BYTES:
        actual = f"{length:,} bytes of header in a file of {size_bytes:,} bytes"
        fault = "the header is longer than the file", "a header that ends in the file", actual
    elif length < 2:
        fault = "the header is too short", "2 bytes or more", f"{length} bytes"
    elif head[_LENGTH_BYTES] != ord("{"):
        actual = f"byte 0x{head[_LENGTH_BYTES]:02x}"
        fault = "the header is not a JSON object", "'{'", actual
    else:
        raw = bytearray(length)
        read_into(descriptor, memoryview(raw), _LENGTH_BYTES, path)
        return raw
    if kind := sniff(bytes(head)):
        expected, hint = "the safetensors format, as the name says", kind.hint
        fault = "this is not a safetensors file", expected, kind.text
    raise InputError(fault[0], where=path, expected=fault[1], found=fault[2], hint=hint)


def _parse(raw: bytearray, path: Path) -> JsonDict:
    tensors = raw.count(b'"data_offsets"')
    if tensors > MAX_TENSORS:
        raise InputError(
            "the header lists too many tensors",
            where=path,
            expected=f"at most {MAX_TENSORS:,}",
            found=f"{tensors:,}",
        )
    if len(raw) > _FREE_HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * tensors:
        raise InputError(
            "the header is far too long for its number of tensors",
            where=path,
            found=f"{len(raw):,} bytes for {tensors:,} tensors",
        )
    max_values = _FREE_VALUES + _VALUES_PER_TENSOR * tensors
    entries = parse_json(raw, f"{path} (header)", max_values=max_values)
    assert isinstance(entries, dict)  # it begins with a brace
    return entries


class _HeaderCheck:
    """One pass over the entries of a header that collects every problem."""

    def __init__(self, path: Path, header_bytes: int, identity: Identity) -> None:
        self.path = path
        self.data_start = _LENGTH_BYTES + header_bytes
        self.identity = identity
        self.problems = Problems()
        self.spans: list[DataSpan] = []

    def header(self, entries: JsonDict) -> Header:
        """Return the checked header, or raise with all its problems."""
        metadata = self._metadata(entries.pop("__metadata__", {}))
        tensors = {}
        for name, entry in entries.items():
            if fault := name_fault(name):
                self._add(name, fault, None, describe(name))
            info = self._tensor(name, entry)
            if info is not None:
                tensors[name] = info
        check_layout(
            self.spans,
            self.data_start,
            self.identity.size_bytes,
            self.path,
            self.problems,
            must_cover=len(self.spans) == len(entries),
        )
        self.problems.raise_if_any()
        return Header(tensors, metadata, self.data_start, self.identity)

    def _add(
        self, name: str, fault: str, expected: str | None, actual: str, hint: str | None = None
    ) -> None:
        where = f"{self.path}, tensor {quoted(name)}"
        self.problems.add(fault, where=where, expected=expected, found=actual, hint=hint)

    def _metadata(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            fault = "the metadata is not an object"
            self._add("__metadata__", fault, "an object", describe(value))
            return {}
        for key, text in value.items():
            if not isinstance(text, str):
                fault = f"the metadata {quoted(key)} is not a string"
                self._add("__metadata__", fault, "a string", describe(text))
        return value

    def _tensor(self, name: str, entry: object) -> TensorInfo | None:
        if type(entry) is not dict or entry.keys() != _FIELDS:
            expected = "an object with dtype, shape and data_offsets, and nothing else"
            if not isinstance(entry, dict):
                fault = "the entry of the tensor is not an object"
                self._add(name, fault, expected, describe(entry))
                return None
            faults = [f"no {key}" for key in sorted(_FIELDS - entry.keys())]
            faults += [f"an extra {quoted(key)}" for key in sorted(entry.keys() - _FIELDS)[:5]]
            fault = "the entry of the tensor has the wrong fields"
            self._add(name, fault, expected, ", ".join(faults))
            return None
        dtype = self._dtype(name, entry["dtype"])
        shape = self._shape(name, entry["shape"])
        span = self._span(name, entry["data_offsets"])
        if dtype is None or shape is None or span is None:
            return None
        nbytes = span.end - span.begin
        needed_bytes = prod(shape) * dtype.itemsize_bytes
        if nbytes != needed_bytes:
            self._add(
                name,
                "the shape and the offsets of the tensor contradict each other",
                f"{needed_bytes:,} bytes for {dtype.safetensors} {list(shape)}",
                f"{nbytes:,} bytes between the offsets {span.begin:,} and {span.end:,}",
            )
        offset = self.data_start + span.begin
        return TensorInfo(name, dtype, shape, nbytes, self.path, offset)

    def _dtype(self, name: str, value: object) -> DType | None:
        dtype = BY_SAFETENSORS.get(value) if type(value) is str else None
        if dtype is not None:
            return dtype
        word = value if type(value) is str and len(value) <= _LONGEST_DTYPE else ""
        if word in _SUB_BYTE:
            fault = "moecc does not support types that pack several elements into a byte"
            hint: str | None = "use an unpacked copy of the model"
        elif word in _UNSUPPORTED:
            fault, hint = "moecc does not compute with this element type", None
        else:
            fault = "the element type is unknown"
            hint = nearest(word.upper(), BY_SAFETENSORS)
        self._add(name, fault, f"one of {', '.join(BY_SAFETENSORS)}", describe(value), hint)
        return None

    def _shape(self, name: str, value: object) -> Shape | None:
        if type(value) is not list or len(value) > MAX_RANK or not _are_sizes(value):
            expected = f"a list of at most {MAX_RANK} whole numbers from 0 to 2^63 - 1"
            self._add(name, "the shape is not usable", expected, _first_fault(value))
            return None
        # Axes of size 0 are excluded: NumPy rejects [0, 2**62, 2**62] although it has no element.
        elements = prod(size for size in value if size)
        if elements > MAX_SIZE:
            expected = "fewer than 2^63 elements"
            self._add(name, "the shape has too many elements", expected, describe(elements))
            return None
        return tuple(value)

    def _span(self, name: str, value: object) -> DataSpan | None:
        pair = value if type(value) is list and len(value) == 2 else []
        if not pair or not _are_sizes(pair) or pair[0] > pair[1]:
            expected = "two whole numbers [begin, end], 0 <= begin <= end < 2^63"
            self._add(name, "the data offsets are not usable", expected, _first_fault(value))
            return None
        span = DataSpan(pair[0], pair[1], name)
        self.spans.append(span)
        return span


def _are_sizes(values: list[object]) -> bool:
    # Not all(): a generator takes three times as long, on 200,000 short lists.
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            return False
    return True


def _first_fault(value: object) -> str:
    """Describe the first element of a list that is not a usable size, if any."""
    if type(value) is not list:
        return describe(value)
    return describe(next((item for item in value if not _are_sizes([item])), value))


# Read ``model.safetensors.index.json``, which maps tensors to shards.

MAX_INDEX_BYTES = 64 << 20
SHARD_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index.

    Attributes:
      path: its file.
      weight_map: file name of each tensor; only those with a usable file name.
      named: all tensors that it names, including those with unusable file names.
      total_size_bytes: the sum of the tensors' sizes, if the index states it.
    """

    path: Path
    weight_map: dict[str, str]
    named: frozenset[str]
    total_size_bytes: int | None

    @property
    def shards(self) -> list[str]:
        """The names of the shards, sorted."""
        return sorted(set(self.weight_map.values()))


def read_index(path: Path, problems: Problems) -> ShardIndex:
    """Read and check an index; errors in its content go to `problems`.

    Raises:
      InputError: the file is not a bounded JSON object.
      MachineError: the file cannot be read.
    """
    content = read_json_object(path, limit_bytes=MAX_INDEX_BYTES)
    total = _total_size(content.get("metadata"), path, problems)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.add(
            "the index has no weight_map",
            where=path,
            expected='"weight_map": an object from tensor names to file names',
            found=describe(weight_map),
        )
        return ShardIndex(path, {}, frozenset(), total)
    usable: dict[str, str] = {}
    # Each bad file is reported once, with the first tensor that names it.
    tensors_of: dict[str, list[str]] = {}
    faults: dict[str, str | None] = {}
    for name, file in weight_map.items():
        if fault := name_fault(name):
            problems.add(fault, where=f"{path}, tensor {quoted(name)}")
        key = file if isinstance(file, str) else describe(file)
        if key not in faults:
            faults[key] = shard_name_fault(file)
        if faults[key] is not None:
            tensors_of.setdefault(key, []).append(name)
        else:
            usable[name] = file
    for key, names in tensors_of.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        problems.add(
            f"the file of the tensor {quoted(names[0])}{more} {faults[key]}",
            where=path,
            expected="the plain name of a .safetensors file in the same folder",
            found=describe(weight_map[names[0]]),
        )
    return ShardIndex(path, usable, frozenset(weight_map), total)


def compare_with_headers(
    index: ShardIndex, headers: dict[Path, Header], problems: Problems
) -> None:
    """Compare an index with the headers of the shards that could be read."""
    where = index.path
    homes: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header.tensors:
            home = homes.setdefault(name, file)
            if home is not file:
                files = f"{home.name} and {file.name}"
                problems.add(
                    f"the tensor {quoted(name)} is in two shards", where=where, found=files
                )
    by_name = {file.name: header.tensors for file, header in headers.items()}
    for name, shard in index.weight_map.items():
        if shard in by_name and name not in by_name[shard]:
            problems.add(
                f"the index puts the tensor {quoted(name)} into a shard that lacks it",
                where=where,
                expected=f"it in {quoted(shard)}",
                found=f"it is in {homes[name].name}" if name in homes else None,
            )
    for name, home in homes.items():
        if name not in index.named:
            fault = f"the tensor {quoted(name)} of {home.name} is not in the index"
            problems.add(fault, where=where)
    total = sum(info.nbytes for header in headers.values() for info in header.tensors.values())
    if not problems and index.total_size_bytes not in (None, total):
        problems.add(
            "the index states another total size than the tensors have",
            where=where,
            expected=f"{total:,} bytes",
            found=f"{index.total_size_bytes:,} bytes",
        )


def shard_name_fault(file: object) -> str | None:
    """Return why a file name in an index must not be opened, or None."""
    if not isinstance(file, str):
        return "is not a string"
    if fault := name_fault(file):
        return f"is not usable: {fault}"
    # Windows' rules are the stricter ones: they cover drives, shares and both kinds of slash.
    windows = PureWindowsPath(file)
    if windows.drive or windows.root:
        return "has an absolute path"
    if ".." in windows.parts:
        return "has a path that climbs out of the folder"
    if "/" in file or "\\" in file:
        return "has a path with folders in it"
    if not file.endswith(SHARD_SUFFIX) or file == SHARD_SUFFIX:
        return f"does not end in {SHARD_SUFFIX}"
    return None


def _total_size(metadata: object, path: Path, problems: Problems) -> int | None:
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    # Older versions of transformers wrote it as a float.
    if total is None or (type(total) in (int, float) and total == int(total) and total >= 0):
        return None if total is None else int(total)
    problems.add(
        "the total_size of the index is not a size",
        where=path,
        expected="a whole number of bytes",
        found=describe(total),
    )
    return None


# Select the weight files of a folder, and report ambiguous or missing ones.

SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|nemo|keras|distcp)", re.DOTALL)
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state).*", re.DOTALL)
_SHOWN_NAMES = 10
_NONE = "the folder has no weights"


def choose_weights(
    path: Path, names: set[str], problems: Problems
) -> tuple[ShardIndex | None, list[str]]:
    """Return the index of a folder, if there is one, and the names of the files to open.

    Args:
      path: the folder.
      names: the files in the folder.
      problems: receives the errors; files that are known to be irrelevant are not reported.
    """
    numbered = sorted(name for name in names if _SHARD.fullmatch(name))
    if ADAPTER_CONFIG in names and names.intersection((SINGLE_NAME, INDEX_NAME, *numbered)):
        problems.add(
            "the folder holds a model and an adapter: transformers would load the adapter, too",
            where=path,
            expected="one of the two",
            found=ADAPTER_CONFIG,
            hint="move adapter_config.json out if the model is meant; else merge the adapter with "
            "PEFT (merge_and_unload), and give that model",
        )
    if INDEX_NAME in names:
        index = _read_index(path, problems)
        if index is None:
            return None, []
        shards = set(index.shards)
        if SINGLE_NAME in names and shards != {SINGLE_NAME}:
            # transformers reads a file of this name alone, whatever else the index names.
            _ambiguous(path, [SINGLE_NAME, INDEX_NAME], problems)
        leftover = [name for name in numbered if name not in shards]
        if leftover and shards:
            problems.add(
                "the folder has shards that the index does not name, perhaps of an earlier run",
                where=path,
                found=_some(leftover),
                hint="move them out of the folder",
            )
        return index, index.shards
    if SINGLE_NAME in names:
        if numbered:
            _ambiguous(path, [SINGLE_NAME, *numbered], problems)
        return None, [SINGLE_NAME]
    if numbered:
        problems.add(
            f"the folder has shards but no {INDEX_NAME}",
            where=path,
            found=_some(numbered),
            hint="fetch the index from where the shards came from",
        )
        return None, numbered
    expected = f"{SINGLE_NAME}, or shards with {INDEX_NAME}"
    fault, content, hint = _other_content(names)
    problems.add(fault, where=path, expected=expected, found=content, hint=hint)
    return None, []


def _read_index(path: Path, problems: Problems) -> ShardIndex | None:
    file = path / INDEX_NAME
    with problems:
        check_file(file, path)
        return read_index(file, problems)
    return None


def _ambiguous(path: Path, files: list[str], problems: Problems) -> None:
    problems.add(
        "the folder holds more than one set of weights",
        where=path,
        expected=f"either {SINGLE_NAME}, or shards with {INDEX_NAME}",
        found=_some(files),
        hint="move the set that is not wanted out of the folder",
    )


def _other_content(names: set[str]) -> tuple[str, str | None, str | None]:
    pickled = sorted(n for n in names if _PICKLED.fullmatch(n) and not _NOT_WEIGHTS.fullmatch(n))
    others = sorted(name for name in names if name.endswith(SHARD_SUFFIX))
    adapters = [name for name in others if name.startswith("adapter_")]
    original = [name for name in others if name.startswith("consolidated")]
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if adapters:
        hint = "convert its base model: -p 'merge-adapter{source=a}' --experts a=ADAPTER"
        return "the folder holds an adapter, not a model", _some(adapters), hint
    if original:
        hint = "convert them to the Hugging Face layout first, or fetch the files of that layout"
        return "the weights are in Mistral's own layout", _some(original), hint
    if others:
        hint = f"rename the file that you mean to {SINGLE_NAME}"
        return "the folder holds only variants of the weights", _some(others), hint
    if gguf:
        hint = f"give the file as the source, e.g. {gguf[0]!r}"
        return "the folder holds GGUF files", _some(gguf), hint
    if any(_MEGATRON.fullmatch(name) for name in names):
        return "this is a checkpoint of Megatron, which is made of pickles", None, _FROM_MEGATRON
    if pickled:
        convert = (
            "moecc never opens pickles, because unpickling runs code; fetch the safetensors "
            "version of the model, or convert it in a sandbox with a tool that you trust"
        )
        return "the folder has its weights only as pickles", _some(pickled), convert
    if not names:
        return "the folder is empty", None, None
    if kind := _other_format(names):
        return kind[0], None, kind[1]
    nested = [name for name in ("snapshots", "blobs") if name in names]
    inside = "give the folder below snapshots/ whose name is the revision" if nested else None
    return _NONE, None, inside


def lacks_weights(names: set[str]) -> bool:
    """Whether a folder with these files holds no weights of any kind, and no part of them."""
    return not any(n.endswith((SHARD_SUFFIX, INDEX_NAME)) for n in names) and (
        _other_content(names)[0] == _NONE
    )


_MEGATRON = re.compile(
    r"latest_checkpointed_iteration\.txt|iter_[0-9]{7}|mp_rank_[0-9_]+|.*\.distcp|common\.pt",
    re.DOTALL,
)
_FROM_MEGATRON = (
    "moecc never opens pickles, because unpickling runs code; export the model to a Hugging Face "
    "folder with Megatron-Bridge, or with Megatron's tools/checkpoint/convert.py"
)
_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "orbax.checkpoint"}
_ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
_NO_TREE = (
    "moecc finds no tree of arrays in it: give the folder that has _METADATA, or export it to a "
    "Hugging Face folder with the framework that wrote it"
)


def _other_format(names: set[str]) -> tuple[str, str] | None:
    """Return the name of another framework's checkpoint, and what to do with it."""
    if any(_ORBAX_UNFINISHED in name for name in names):
        hint = "its writer was interrupted: take an earlier step, and export that"
        return "this is an Orbax checkpoint that was never completed", hint
    if names & _ORBAX:
        return "this is an Orbax checkpoint", _NO_TREE
    return None


def _some(names: list[str]) -> str:
    shown = ", ".join(quoted(name) for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more:,} more" if more > 0 else shown


# Assign tensors to safetensors files and offsets, and write the headers.

MAX_WRITTEN_HEADER_BYTES = 100_000_000
"""The limit of the format's reference reader."""

_ALIGNMENT_BYTES = 8
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, element type and shape, and its blocks if quantised."""

    name: str
    dtype: DType
    shape: Shape
    storage: Storage | None = None

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        if self.storage is not None:
            return prod(self.shape) // self.storage.block * self.storage.block_bytes
        return prod(self.shape) * self.dtype.itemsize_bytes


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Attributes:
      name: its name in the folder.
      header: the length and the padded header: everything before the data.
      offsets: the start of the data of each tensor in the file, by the tensor's name, in order.
      size_bytes: the size of the file.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size_bytes: int


@dataclass(frozen=True)
class ConversionPart:
    """A share of the shards of a conversion: its number, from 1, and the number of parts."""

    number: int
    count: int

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the consecutive items of a sequence that belong to this part."""
        start, stop = (n * len(items) // self.count for n in (self.number - 1, self.number))
        return items[start:stop]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def plan_shards(
    entries: Sequence[Entry], max_shard_bytes: int, metadata: Mapping[str, str]
) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_bytes`, header included.

    Tensors are sorted by name, numbers compared as numbers, so that a layer is stored in one or
    two files; within a file the tensors with the largest elements come first, so that all are
    aligned.  A tensor larger than the limit gets a file of its own.

    Raises:
      InputError: a header would be too long for other readers.
    """
    groups: list[list[Entry]] = [[]]
    fixed = len(_header([], metadata)) + _ALIGNMENT_BYTES
    filled = fixed
    for entry in sorted(entries, key=lambda e: natural(e.name)):
        needed = entry.nbytes + _entry_bytes(entry)
        if groups[-1] and filled + needed > max_shard_bytes:
            groups.append([])
            filled = fixed
        groups[-1].append(entry)
        filled += needed
    count = len(groups)
    return [
        _shard(
            SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors",
            group,
            metadata,
        )
        for i, group in enumerate(groups, 1)
    ]


def shards_of(
    entries: Sequence[Entry],
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    part: ConversionPart | None = None,
) -> Sequence[Shard]:
    """Return the shards of a checkpoint, or those of one part.

    Args:
      entries: the tensors, in any order.
      max_shard_bytes: the limit of a shard, header included.
      metadata: additional header entries of each file, besides ``format``.
      part: the part; None for all shards.

    Raises:
      UsageError: an invalid limit, or more parts than shards.
      InputError: names that cannot be written, all of them at once.
    """
    if max_shard_bytes < 1:
        raise UsageError("max_shard_bytes must be at least 1")
    problems = Problems()
    names: set[str] = set()
    for name in (entry.name for entry in entries):
        fault = name_fault(name) or ("two tensors of one name" * (name in names))
        if name == "__metadata__":
            fault = "the name belongs to the format"
        if fault:
            problems.add(fault, where=f"output tensor {quoted(name)}")
        names.add(name)
    problems.raise_if_any()
    shards = plan_shards(entries, max_shard_bytes, {"format": "pt", **metadata})
    if part is None:
        return shards
    if part.count > len(shards):
        fitting = max(1, sum(entry.nbytes for entry in entries) // part.count)
        raise UsageError(
            "there are more parts than shards", where=f"--part {part}",
            expected=f"at most {amount(len(shards), 'part')}", found=str(part.count),
            hint=f"--max-shard-bytes {fitting} makes more shards",
        )  # fmt: skip
    return part.share(shards)


def index_json(shards: Sequence[Shard], total_bytes: int, parameters: int) -> bytes:
    """Return the content of the index of several shards."""
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    ordered = {name: weight_map[name] for name in sorted(weight_map, key=natural)}
    metadata = {"total_size": total_bytes, "total_parameters": parameters}
    return json_content({"metadata": metadata, "weight_map": ordered})


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts ``layers.2`` before ``layers.10``."""
    parts = _DIGITS.split(name)
    key = tuple((0, int(p)) if i % 2 else (1, p) for i, p in enumerate(parts))
    # Equal numbers with different leading zeros are different names.
    return (*key, (2, name))


def _shard(name: str, group: list[Entry], metadata: Mapping[str, str]) -> Shard:
    ordered = sorted(group, key=lambda e: (-e.dtype.itemsize_bytes, natural(e.name)))
    header = _header(ordered, metadata)
    if len(header) > MAX_WRITTEN_HEADER_BYTES:
        raise InputError(
            f"the header of {name} is too long",
            expected=f"at most {MAX_WRITTEN_HEADER_BYTES:,} bytes",
            found=f"{len(header):,} bytes for {len(group):,} tensors",
            hint="choose a smaller limit for a shard",
        )
    offsets: dict[str, int] = {}
    at = len(header)
    for entry in ordered:
        offsets[entry.name] = at
        at += entry.nbytes
    return Shard(name, header, offsets, at)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    content: JsonDict = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        content[entry.name] = {
            "dtype": entry.dtype.safetensors,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _entry_bytes(entry: Entry) -> int:
    """Return a lower bound on the bytes of a header entry, for any offsets."""
    name = len(json.dumps(entry.name, ensure_ascii=False).encode())
    fixed = len(',:{"dtype":"","shape":[],"data_offsets":[,]}') + 2 * 19
    return name + fixed + 8 + sum(len(str(size)) + 1 for size in entry.shape)
