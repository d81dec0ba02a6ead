"""Folders whose matrices are stored quantised, read as if they were not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moecc.errors import InputError
from moecc.formats.folder import SafetensorsFolder, rows_of
from moecc.formats.source import TensorInfo
from moecc.support.documents import parse_json
from moecc.support.problems import Problems, describe, quoted
from moecc.support.process import Closing
from moecc.support.text import amount
from moecc.types import F32, Array

# A tensor that is stored in several parts, and what schemes need to find and read it.

ReadRows = Callable[[str, int, int | None], Array]
"""Reads rows [start, stop) of the first axis of a stored tensor."""


@dataclass(frozen=True)
class Packed:
    """A tensor that is stored in parts.

    Attributes:
      name: its name when it is not quantised.
      shape: its sizes, outermost first.
      storage: the scheme, in a remark.
      parts: the stored tensors that it is made of; the first one is the largest.
      rows: returns rows [start, stop) of its first axis as float32.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    parts: tuple[str, ...]
    rows: Callable[[ReadRows, int, int], Array]


@dataclass(frozen=True)
class Stored:
    """What a scheme finds its tensors in.

    Attributes:
      tensors: the stored tensors by name.
      options: the content of ``quantization_config``.
      problems: receives what is wrong.
    """

    tensors: Mapping[str, TensorInfo]
    options: Mapping[str, object]
    problems: Problems

    def ending(self, suffix: str) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the tensors whose names end in `suffix`, each with what is before it."""
        for name, info in self.tensors.items():
            if name.endswith(suffix):
                yield name[: -len(suffix)], info

    def part(
        self, name: str, shape: tuple[int, ...] | None, types: tuple[str, ...]
    ) -> TensorInfo | None:
        """Return a part with the given shape and one of the types; else report, and None."""
        info = self.tensors.get(name)
        what = f"the quantised matrix lacks its part {quoted(name)}"
        if info is None:
            self.problems.add(what, hint="the download may be incomplete; fetch the files again")
            return None
        if (shape is not None and info.shape != shape) or info.dtype.name not in types:
            sizes = "" if shape is None else f"{list(shape)} of "
            self.problems.add(
                "the part of a quantised matrix is not what the others require",
                where=f"{info.file}, tensor {quoted(name)}",
                expected=f"{sizes}{' or '.join(types)}",
                found=f"{list(info.shape)} of {info.dtype.name}",
            )
            return None
        return info

    def option(self, name: str, expected: tuple[object, ...], default: object = None) -> object:
        """Return an option of the scheme; report a value that is not one of `expected`."""
        value = self.options.get(name)
        value = default if value is None else value
        if not any(value == one and type(value) is type(one) for one in expected):
            self.problems.add(
                "moecc does not read weights quantised so",
                where=f"config.json: quantization_config.{name}",
                expected=" or ".join(describe(one) for one in expected),
                found=describe(value),
            )
            return expected[0]
        return value

    def count(self, name: str, default: int) -> int:
        """Return an option that is a size, or -1 for "all of it"; report anything else."""
        value = self.options.get(name)
        value = default if value is None else value
        if type(value) is int and (0 < value < 1 << 31 or value == -1):
            return value
        where = f"config.json: quantization_config.{name}"
        self.problems.add("not a size", where=where, found=describe(value))
        return default


FLOATS = ("f32", "f16", "bf16")
"""The types of scales."""


# bitsandbytes: matrices of four bits with a table of values, and of eight bits with a row's
# scale.
#
# Four bits: 64 elements (or as stated) share a scale, which may itself be stored in eight bits
# with a
# table; element = table[code] x scale.  Eight bits: element = integer x scale of its row / 127.

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MOST_STATE_BYTES = 4096


def find_bitsandbytes(stored: Stored, read: ReadRows) -> Iterator[Packed]:
    """Yield the matrices; the shapes of those of four bits are read from small tensors."""
    for kind in _KINDS:
        for name, info in stored.ending(_STATE + kind):
            state = _read_state(stored, info, read)
            if state is not None:
                yield from _four_bits(stored, name, info, state, kind)
    for stem, scale in stored.ending(".SCB"):
        yield from _eight_bits(stored, stem, scale, read)


@dataclass(frozen=True)
class _State:
    """What is stored of a matrix as JSON."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    nested_offset: float


def _read_state(stored: Stored, info: TensorInfo, read: ReadRows) -> _State | None:
    where = f"{info.file}, tensor {quoted(info.name)}"
    if info.dtype.name != "u8" or info.nbytes > _MOST_STATE_BYTES:
        stored.problems.add("not the state of a quantised matrix", where=where)
        return None
    try:
        data = parse_json(bytearray(read(info.name, 0, None).tobytes()), where)
    except InputError as error:
        stored.problems.extend(error.problems)
        return None
    found = data if isinstance(data, dict) else {}
    shape, offset = found.get("shape"), found.get("nested_offset", 0.0)
    sizes = [found.get("blocksize"), found.get("nested_blocksize", 1)]
    whole = [*sizes, *(shape if isinstance(shape, list) else [None])]
    if not all(type(n) is int and 0 < n < 1 << 40 for n in whole) or not isinstance(offset, float):
        stored.problems.add(
            "not the state of a quantised matrix", where=where,
            expected="shape and blocksize as positive integers", found=describe(data),
        )  # fmt: skip
        return None
    assert isinstance(shape, list)
    return _State(tuple(shape), whole[0], whole[1], offset)


def _four_bits(
    stored: Stored, name: str, info: TensorInfo, state: _State, kind: str
) -> Iterator[Packed]:
    count = prod(state.shape)
    blocks = -(-count // state.block)
    nested = f"{name}.nested_absmax" in stored.tensors
    needed: Mapping[str, tuple[tuple[int, ...] | None, tuple[str, ...]]] = {
        "": (None, ("u8",)),
        ".absmax": ((blocks,), ("u8",) if nested else FLOATS),
        ".quant_map": ((16,), FLOATS),
    }
    if nested:
        scales = (-(-blocks // state.nested_block),)
        needed = {
            **needed, ".nested_absmax": (scales, FLOATS), ".nested_quant_map": ((256,), FLOATS),
        }  # fmt: skip
    found = [stored.part(name + suffix, *what) for suffix, what in needed.items()]
    parts = tuple(part.name for part in found if part is not None)
    packed = stored.tensors.get(name)
    if packed is not None and prod(packed.shape) != -(-count // 2):
        stored.problems.add(
            "the bytes are not those of the matrix", where=f"tensor {quoted(name)}",
            expected=f"{-(-count // 2):,} for {list(state.shape)}", found=f"{prod(packed.shape):,}",
        )  # fmt: skip
    elif len(parts) == len(needed):
        rows = partial(_four_bit_rows, name, state, nested)
        yield Packed(name, state.shape, f"{kind} (bitsandbytes)", (*parts, info.name), rows)


def _four_bit_rows(
    name: str, state: _State, nested: bool, read: ReadRows, start: int, stop: int
) -> Array:
    width = prod(state.shape[1:])
    begin, end = start * width, stop * width
    # Bytes and blocks that the rows begin and end in are read whole.
    first, last = begin // state.block, -(-end // state.block)
    codes = read(name, 0, None).reshape(-1)[begin // 2 : -(-end // 2)]
    table = read(f"{name}.quant_map", 0, None).astype(np.float32)
    both = np.stack([table[codes >> 4], table[codes & 15]], axis=-1).reshape(-1)
    values = both[begin % 2 : begin % 2 + end - begin]
    scales = np.repeat(_scales(name, state, nested, read)[first:last], state.block)
    values = values * scales[begin - first * state.block :][: end - begin]
    found: Array = values.reshape(stop - start, *state.shape[1:])
    return found


def _scales(name: str, state: _State, nested: bool, read: ReadRows) -> Array:
    stored = read(f"{name}.absmax", 0, None)
    if not nested:
        return stored.astype(np.float32)
    table = read(f"{name}.nested_quant_map", 0, None).astype(np.float32)
    outer = read(f"{name}.nested_absmax", 0, None).astype(np.float32)
    whole = np.repeat(outer, state.nested_block)[: stored.size]
    scales: Array = table[stored] * whole + np.float32(state.nested_offset)
    return scales


def _eight_bits(stored: Stored, stem: str, scale: TensorInfo, read: ReadRows) -> Iterator[Packed]:
    name = f"{stem}.weight"
    info = stored.part(name, None, ("i8",))
    if info is None:
        return
    stored.part(scale.name, info.shape[:1], FLOATS)
    if len(info.shape) != 2:
        found = f"{list(info.shape)}"
        stored.problems.add("not a matrix", where=f"tensor {quoted(name)}", found=found)
        return
    beside = [n for n in (f"{stem}.weight_format",) if n in stored.tensors]
    for order in beside:
        # Older files have orders of elements for one generation of GPUs.
        if np.any(read(order, 0, None)):
            stored.problems.add(
                "the elements are not stored row by row", where=f"tensor {quoted(order)}",
                expected="0", hint="save the model again with a newer bitsandbytes",
            )  # fmt: skip
    rows = partial(_eight_bit_rows, name, scale.name)
    yield Packed(name, info.shape, "int8 (bitsandbytes)", (name, scale.name, *beside), rows)


def _eight_bit_rows(name: str, scale: str, read: ReadRows, start: int, stop: int) -> Array:
    values = read(name, start, stop).astype(np.float32)
    values *= read(scale, start, stop).astype(np.float32)[:, None]
    # As bitsandbytes does, in two products, so that the last bits are the same.
    values *= np.float32(1 / 127)
    return values


# Eight-bit floats with scales: of blocks (DeepSeek, Qwen), of rows or of a whole matrix.
#
# An element is its eight-bit value times the scale of its block.

_SUFFIXES = ("_scale_inv", "_scale")
_EIGHT_BIT = ("f8e4m3fn", "f8e5m2")


def find_fp8(stored: Stored) -> Iterator[Packed]:
    """Yield every tensor of eight-bit floats, with its scales."""
    blocks = _block_sizes(stored)
    for name, info in stored.tensors.items():
        if info.dtype.name not in _EIGHT_BIT:
            continue
        scale = next((name + s for s in _SUFFIXES if name + s in stored.tensors), name + "_scale")
        found = stored.part(scale, None, FLOATS)
        if found is None:
            continue
        sizes = _sizes(info, found, blocks)
        if sizes is None:
            stored.problems.add(
                "the scales do not match the matrix",
                where=f"{found.file}, tensor {quoted(scale)}",
                expected=_expected(info, blocks),
                found=f"{list(found.shape)}",
            )
            continue
        yield Packed(
            name, info.shape, "FP8", (name, scale), partial(_rows, info, found, sizes)
        )  # fmt: skip


def _block_sizes(stored: Stored) -> tuple[int, int] | None:
    """Return rows and columns of a block, where the config states them."""
    value = stored.options.get("weight_block_size") or _compressed_blocks(stored)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    stored.problems.add(
        "not the size of a block", where="config.json: quantization_config.weight_block_size",
        expected="[rows, columns]", found=describe(value),
    )  # fmt: skip
    return None


def _compressed_blocks(stored: Stored) -> object:
    """Return the block sizes of the compressed-tensors format; report what are not FP8 weights."""
    groups = stored.options.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            stored.problems.add(
                "moecc does not read weights quantised so",
                where="config.json: quantization_config.config_groups",
                expected="floats of 8 bits",
                found=f"{describe(weights.get('type'))} of {describe(weights.get('num_bits'))}",
            )
        return weights.get("block_structure")
    return None


def _sizes(
    info: TensorInfo, scale: TensorInfo, blocks: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return rows and columns of a block, or None if the scales do not match the matrix."""
    if len(info.shape) < 2:
        return None
    *lead, rows, columns = info.shape
    shape = scale.shape
    if shape in ((), (1,)):
        return rows, columns
    if shape in ((*lead, rows), (*lead, rows, 1)):
        return 1, columns
    if blocks is None:
        return None
    counts = -(-rows // blocks[0]), -(-columns // blocks[1])
    return blocks if shape == (*lead, *counts) else None


def _expected(info: TensorInfo, blocks: tuple[int, int] | None) -> str:
    size = f"blocks of {blocks[0]} x {blocks[1]}" if blocks else "a row"
    return f"a scale for {size} of {list(info.shape)}"


def _rows(
    info: TensorInfo, scale: TensorInfo, sizes: tuple[int, int], read: ReadRows,
    start: int, stop: int,
) -> Array:  # fmt: skip
    table = np.arange(256, dtype=np.uint8).view(info.dtype.numpy).astype(np.float32)
    values = table[read(info.name, start, stop).view(np.uint8)]
    one_for_all = scale.shape in ((), (1,))
    if len(info.shape) > 2:
        scales = read(scale.name, *((0, None) if one_for_all else (start, stop)))
        for number, matrix in enumerate(values.reshape(-1, *info.shape[-2:])):
            of = scales if one_for_all else scales.reshape(len(values), -1)[number]
            _scale(matrix, of, sizes, 0)
        return values
    first, last = start // sizes[0], -(-stop // sizes[0])
    scales = read(scale.name, *((0, None) if one_for_all else (first, last)))
    _scale(values, scales, sizes, start)
    return values


def _scale(matrix: Array, scales: Array, sizes: tuple[int, int], start: int) -> None:
    """Multiply rows of a matrix, the first of which is row `start`, by the scales of its blocks."""
    high, wide = sizes
    first = start // high
    rows = scales.astype(np.float32).reshape(-1, -(-matrix.shape[1] // wide))
    for number, row in enumerate(rows, first):
        begin, end = max(number * high - start, 0), (number + 1) * high - start
        matrix[begin:end] *= np.repeat(row, wide)[: matrix.shape[1]]


# GPTQ and AWQ: integers of a few bits, packed into words, with a scale and a zero for a group.
#
# Matrices are stored with their inputs first.  GPTQ packs along the inputs, AWQ along the outputs
# in
# an order of its own; the element is (integer - zero) x scale.  GPTQ's first format stores zero -
# 1.

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of the eight outputs in a word, which one is in each four bits, the lowest first."""


@dataclass(frozen=True)
class _Matrix:
    """One matrix: the names of its parts, and how integers are in words."""

    stem: str
    inputs: int
    outputs: int
    bits: int
    group: int
    added: int
    along_outputs: bool
    has_index: bool

    def rows(self, read: ReadRows, start: int, stop: int) -> Array:
        """Return outputs [start, stop), ``[out, in]``."""
        scales = read(f"{self.stem}.scales", 0, None)[:, start:stop].astype(np.float32)
        zeros = self._zeros(read(f"{self.stem}.qzeros", 0, None), start, stop)
        groups = self._groups(read, len(scales))
        values = self._integers(read(f"{self.stem}.qweight", 0, None), start, stop)
        for column in range(0, self.inputs, 1024):
            piece = slice(column, column + 1024)
            of = groups[piece]
            values[piece] -= zeros[of]
            values[piece] *= scales[of]
        return np.ascontiguousarray(values.T)

    def _groups(self, read: ReadRows, count: int) -> Array:
        """Return the group of each input."""
        if not self.has_index:
            return np.arange(self.inputs) // self.group
        groups = read(f"{self.stem}.g_idx", 0, None)
        if groups.size and (groups.min() < 0 or groups.max() >= count):
            raise InputError(
                "an input is in a group that does not exist",
                where=f"tensor {quoted(f'{self.stem}.g_idx')}",
                expected=f"0 to {count - 1}",
                found=f"{int(groups.min())} to {int(groups.max())}",
            )
        return groups

    def _zeros(self, words: Array, start: int, stop: int) -> Array:
        wide = _unpacked(words, self.bits, self.along_outputs)[:, start:stop]
        return (wide + self.added).astype(np.float32)

    def _integers(self, words: Array, start: int, stop: int) -> Array:
        """Return the integers of outputs [start, stop) as float32, ``[in, out]``."""
        values = np.empty((self.inputs, stop - start), np.float32)
        if self.along_outputs:
            for row in range(0, self.inputs, 1024):
                piece = _unpacked(words[row : row + 1024], self.bits, True)
                values[row : row + 1024] = piece[:, start:stop]
            return values
        count, mask = _WORD // self.bits, (1 << self.bits) - 1
        chosen = words[:, start:stop].view(np.uint32)
        for place in range(count):
            values[place::count] = (chosen >> np.uint32(place * self.bits)) & mask
        return values


def _unpacked(words: Array, bits: int, reordered: bool) -> Array:
    """Return the integers in each word of ``[rows, words]``, in their order along the last axis."""
    count, mask = _WORD // bits, (1 << bits) - 1
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(bits)
    found = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(mask)
    if reordered:
        found = found[..., np.argsort(_AWQ_ORDER)]
    return found.reshape(len(words), -1).astype(np.int32)


def find_gptq(stored: Stored) -> Iterator[Packed]:
    """Yield the matrices of a GPTQ checkpoint."""
    bits = int(str(stored.option("bits", (2, 4, 8), 4)))
    format = stored.option("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    group = stored.count("group_size", 128)
    for stem, words in stored.ending(".qweight"):
        if _is_matrix(stored, stem):
            inputs, outputs = words.shape[0] * _WORD // bits, words.shape[1]
            matrix = _Matrix(
                stem, inputs, outputs, bits, group if group > 0 else max(inputs, 1),
                1 if format == "gptq" else 0, False, f"{stem}.g_idx" in stored.tensors,
            )  # fmt: skip
            yield from _packed(stored, matrix, "GPTQ")


def find_awq(stored: Stored) -> Iterator[Packed]:
    """Yield the matrices of an AWQ checkpoint."""
    bits = int(str(stored.option("bits", (4,), 4)))
    stored.option("version", ("gemm", "GEMM"), "gemm")
    stored.option("zero_point", (True,), True)
    group = stored.count("group_size", 128)
    for stem, words in stored.ending(".qweight"):
        if _is_matrix(stored, stem):
            inputs, outputs = words.shape[0], words.shape[1] * _WORD // bits
            size = group if group > 0 else max(inputs, 1)
            matrix = _Matrix(stem, inputs, outputs, bits, size, 0, True, False)
            yield from _packed(stored, matrix, "AWQ")


def _is_matrix(stored: Stored, stem: str) -> bool:
    info = stored.part(f"{stem}.qweight", None, ("i32", "u32"))
    if info is not None and len(info.shape) != 2:
        where, found = f"tensor {quoted(info.name)}", f"{list(info.shape)}"
        stored.problems.add("not a matrix of words", where=where, found=found)
        return False
    return info is not None


def _packed(stored: Stored, matrix: _Matrix, scheme: str) -> Iterator[Packed]:
    stem, per_word = matrix.stem, _WORD // matrix.bits
    groups = -(-matrix.inputs // matrix.group)
    if matrix.has_index:
        # With an index, groups need not be of one size; the scales say how many there are.
        scales = stored.tensors.get(f"{stem}.scales")
        groups = scales.shape[0] if scales is not None and scales.shape else groups
    words = ("i32", "u32")
    parts = [
        stored.part(f"{stem}.qweight", None, words),
        stored.part(f"{stem}.qzeros", (groups, -(-matrix.outputs // per_word)), words),
        stored.part(f"{stem}.scales", (groups, matrix.outputs), FLOATS),
        *([stored.part(f"{stem}.g_idx", (matrix.inputs,), words)] if matrix.has_index else []),
    ]
    names = tuple(part.name for part in parts if part is not None)
    if len(names) == len(parts):
        shape = (matrix.outputs, matrix.inputs)
        yield Packed(f"{stem}.weight", shape, f"{scheme} {matrix.bits} bit", names, matrix.rows)


# MXFP4: floats of four bits, 32 of which share a power of two (OCP microscaling, version 1.0).

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BYTES = 16
_BIAS = 127


def find_mxfp4(stored: Stored) -> Iterator[Packed]:
    """Yield the matrices of experts ``[expert, in, out]``, stored as ``[expert, out, …]``."""
    for name, blocks in stored.ending("_blocks"):
        scales = stored.part(name + "_scales", blocks.shape[:-1], ("u8",))
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or blocks.dtype.name != "u8":
            stored.problems.add(
                "not the blocks of experts",
                where=f"{blocks.file}, tensor {quoted(blocks.name)}",
                expected="[expert, out, block, 16] of u8",
                found=f"{list(blocks.shape)} of {blocks.dtype.name}",
            )
        elif scales is not None:
            experts, out, count, _ = blocks.shape
            parts = (blocks.name, scales.name)
            shape = (experts, count * 2 * _BYTES, out)
            yield Packed(name, shape, "MXFP4", parts, partial(_mxfp4_rows, parts, shape))


def _mxfp4_rows(
    parts: tuple[str, str], shape: tuple[int, ...], read: ReadRows, start: int, stop: int
) -> Array:
    values = np.empty((stop - start, *shape[1:]), np.float32)
    # The blocks of all experts together, unpacked, would be several times as large.
    for expert in range(start, stop):
        packed = read(parts[0], expert, expert + 1)[0]
        powers = read(parts[1], expert, expert + 1)[0].astype(np.int32) - _BIAS
        both = np.stack([_VALUES[packed & 15], _VALUES[packed >> 4]], axis=-1)
        scaled = np.ldexp(both.reshape(*packed.shape[:2], -1), powers[..., None])
        values[expert - start] = scaled.reshape(shape[2], shape[1]).T
    return values


# A folder of quantised safetensors, with the names, shapes and config of one that is not.

KEY = "quantization_config"
MOST_KEPT_BYTES = 256 << 20


def _alone(find: Callable[[Stored], Iterator[Packed]]) -> Callable[..., Iterator[Packed]]:
    return lambda stored, read: find(stored)


METHODS: Mapping[str, Callable[[Stored, ReadRows], Iterator[Packed]]] = {
    "fp8": _alone(find_fp8),
    "fbgemm_fp8": _alone(find_fp8),
    "compressed-tensors": _alone(find_fp8),
    "mxfp4": _alone(find_mxfp4),
    "gptq": _alone(find_gptq),
    "awq": _alone(find_awq),
    "bitsandbytes": find_bitsandbytes,
}
"""What finds the matrices of each ``quant_method``."""


class QuantisedFolder(Closing):
    """A folder whose matrices are dequantised when they are read, as float32."""

    format = "safetensors"

    def __init__(self, folder: SafetensorsFolder, packed: Mapping[str, Packed]) -> None:
        self._folder, self._packed = folder, packed
        self._kept = threading.local()
        self.path: Path = folder.path
        self.config = {key: value for key, value in folder.config.items() if key != KEY}
        inner = {part for one in packed.values() for part in one.parts}
        plain = {name: info for name, info in folder.tensors.items() if name not in inner}
        made = {name: _info(one, folder.tensors) for name, one in packed.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({**plain, **made})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; see `Checkpoint.read`."""
        one = self._packed.get(name)
        if one is None:
            return self._folder.read(name, start, stop)
        rows_of(self.tensors[name], start, stop)
        stop = one.shape[0] if stop is None else stop
        # A scale that is not finite gives values that are not finite, which the caller checks.
        with np.errstate(all="ignore"):
            return one.rows(partial(self._part, one), start, stop)

    def _part(self, one: Packed, name: str, start: int, stop: int | None) -> Array:
        """Read rows of a part; a thread keeps those of the matrix that it reads.

        Outputs lie across the words of GPTQ and AWQ, so every block of rows needs all of them.
        """
        if (start, stop) != (0, None):
            return self._folder.read(name, start, stop)
        if getattr(self._kept, "of", None) != one.name:
            self._kept.of, self._kept.parts = one.name, {}
        parts: dict[str, Array] = self._kept.parts
        if name in parts:
            return parts[name]
        found = self._folder.read(name)
        if found.nbytes <= MOST_KEPT_BYTES:
            parts[name] = found
        return found

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files that an export copies byte for byte, by their name in the folder."""
        return self._folder.companions()

    def remarks(self) -> list[str]:
        """Return which matrices were quantised."""
        kinds = Counter(one.storage for one in self._packed.values())
        if not kinds:
            return []
        shown = ", ".join(
            f"{amount(count, 'tensor')} in {name}" for name, count in kinds.most_common()
        )
        return [f"the weights were quantised, which lost precision: {shown}"]

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the card in the folder."""
        return self._folder.card()

    def files(self) -> list[Path]:
        """Return the weight files, the index if there is one, and the config."""
        return self._folder.files()

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        self._folder.require_unchanged()

    def close(self) -> None:
        """Close the files."""
        self._folder.close()


def _info(one: Packed, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    largest = tensors[one.parts[0]]
    size = sum(tensors[part].nbytes for part in one.parts)
    return replace(
        largest, name=one.name, dtype=F32, shape=one.shape, nbytes=size, storage=one.storage
    )


def open_quantised(folder: SafetensorsFolder) -> QuantisedFolder:
    """Return an opened folder with ``quantization_config`` as one that is not quantised.

    Raises:
      InputError: the method is none that moecc reads, or the tensors do not match it; all problems.
    """
    problems = Problems()
    options = folder.config[KEY]
    method = options.get("quant_method") if isinstance(options, dict) else None
    find = METHODS.get(method) if isinstance(method, str) else None
    if not isinstance(options, dict) or find is None:
        raise InputError(
            "the weights are quantised by a method that moecc does not read",
            where=f"{folder.path / 'config.json'}: {KEY}.quant_method",
            expected=f"one of {', '.join(METHODS)}",
            found=describe(method),
            hint="take the checkpoint that is not quantised, or dequantise it with its own library",
        )
    packed = {one.name: one for one in find(Stored(folder.tensors, options, problems), folder.read)}
    if not packed and not problems:
        problems.add(
            "the weights are said to be quantised, and no tensor is",
            where=f"{folder.path / 'config.json'}: {KEY}", found=describe(method),
            hint=f"if they are not quantised any more, remove {KEY}",
        )  # fmt: skip
    problems.raise_if_any()
    return QuantisedFolder(folder, packed)
