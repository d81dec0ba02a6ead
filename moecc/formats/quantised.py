"""Folders whose matrices are stored quantised, read as if they were not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

from moecc.errors import InputError, Problems, describe, quoted
from moecc.formats.folder import SafetensorsFolder, rows_of
from moecc.formats.source import DerivedCheckpoint, TensorInfo, quantised_remark
from moecc.support.documents import parse_json
from moecc.support.lazy import np
from moecc.support.record import Check, Positive, RecordReader, read_record
from moecc.support.untyped import Json
from moecc.types import F32, Array, Shape

# A tensor that is stored in several parts, and the tools with which schemes find and read it.

KEY = "quantization_config"
T = TypeVar("T")
ReadRows = Callable[[str, int, int | None], Array]
"""Reads rows [start, stop) of the first axis of a stored tensor."""

FLOATS = ("f32", "f16", "bf16")
"""The types of scales."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is stored in parts.

    Attributes:
      name: its name when it is not quantised.
      shape: its sizes, outermost first.
      storage: the scheme, in a remark.
      parts: the stored tensors that it is made of; the first one is the largest.
      rows: returns rows [start, stop) of its first axis as float32.
    """

    name: str
    shape: Shape
    storage: str
    parts: tuple[str, ...]
    rows: Callable[[ReadRows, int, int], Array]


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a folder, among which a scheme finds its own.

    Attributes:
      tensors: the stored tensors by name.
      options: the content of ``quantization_config``.
      problems: receives what is wrong.
      read: reads them.
    """

    tensors: Mapping[str, TensorInfo]
    options: Json
    problems: Problems
    read: ReadRows

    def ending(self, suffix: str) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the tensors whose names end in `suffix`, each with what is before it."""
        for name, info in self.tensors.items():
            if name.endswith(suffix):
                yield name[: -len(suffix)], info

    def part(self, name: str, shape: Shape | None, types: tuple[str, ...]) -> TensorInfo | None:
        """Return a part with the given shape and one of the types; else report, and None."""
        info = self.tensors.get(name)
        if info is None:
            self.problems.add(
                f"the quantised matrix lacks its part {quoted(name)}",
                hint="the download may be incomplete; fetch the files again",
            )
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

    def settings(self, cls: Callable[..., T]) -> T:
        """Return the options of a scheme as a record; report the values that it does not have."""
        reader = RecordReader(lambda path: "config.json")
        record = reader.section(cls, self.options, (KEY,), is_open=True)
        self.problems.extend(problem for _, problem in reader.problems)
        return record


# bitsandbytes: matrices of four bits with a table of values, and of eight bits with a scale per
# row.
#
# Four bits: 64 elements (or as stated) share a scale, which may itself be stored in eight bits
# with a table; element = table[code] x scale.  Eight bits: element = integer x scale of its row
# / 127.

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 4096


def find_bitsandbytes(stored: StoredTensors) -> Iterator[PackedTensor]:
    """Yield the matrices; the shapes of those of four bits are read from small tensors."""
    for kind in ("nf4", "fp4"):
        for name, info in stored.ending(_STATE + kind):
            state = _read_state(stored, info)
            if state is not None:
                yield from _four_bits(stored, name, info, state, kind)
    for stem, scale in stored.ending(".SCB"):
        yield from _eight_bits(stored, stem, scale)


@dataclass(frozen=True)
class _FourBitState:
    """The facts of a matrix that are stored beside it, as JSON."""

    shape: tuple[Positive, ...]
    blocksize: Positive
    nested_blocksize: Positive = 1
    nested_offset: float = 0.0


def _read_state(stored: StoredTensors, info: TensorInfo) -> _FourBitState | None:
    where = f"{info.file}, tensor {quoted(info.name)}"
    if info.dtype.name != "u8" or info.nbytes > _MAX_STATE_BYTES:
        stored.problems.add("not the state of a quantised matrix", where=where)
        return None
    with stored.problems:
        document = parse_json(stored.read(info.name, 0, None).tobytes(), where)
        return read_record(_FourBitState, document, where, is_open=True)
    return None


def _four_bits(
    stored: StoredTensors, name: str, info: TensorInfo, state: _FourBitState, kind: str
) -> Iterator[PackedTensor]:
    count = prod(state.shape)
    blocks = -(-count // state.blocksize)
    is_nested = f"{name}.nested_absmax" in stored.tensors
    needed: dict[str, tuple[Shape | None, tuple[str, ...]]] = {
        "": (None, ("u8",)),
        ".absmax": ((blocks,), ("u8",) if is_nested else FLOATS),
        ".quant_map": ((16,), FLOATS),
    }
    if is_nested:
        needed[".nested_absmax"] = ((-(-blocks // state.nested_blocksize),), FLOATS)
        needed[".nested_quant_map"] = ((256,), FLOATS)
    parts = [stored.part(name + suffix, *form) for suffix, form in needed.items()]
    names = tuple(part.name for part in parts if part is not None)
    packed = stored.tensors.get(name)
    if packed is not None and prod(packed.shape) != -(-count // 2):
        stored.problems.add(
            "the bytes are not those of the matrix",
            where=f"tensor {quoted(name)}",
            expected=f"{-(-count // 2):,} for {list(state.shape)}",
            found=f"{prod(packed.shape):,}",
        )
    elif len(names) == len(needed):
        rows = partial(_four_bit_rows, name, state, is_nested)
        storage = f"{kind} (bitsandbytes)"
        yield PackedTensor(name, state.shape, storage, (*names, info.name), rows)


def _four_bit_rows(
    name: str, state: _FourBitState, is_nested: bool, read: ReadRows, start: int, stop: int
) -> Array:
    width = prod(state.shape[1:])
    begin, end = start * width, stop * width
    # Bytes and blocks that the rows begin and end in are read completely.
    first, last = begin // state.blocksize, -(-end // state.blocksize)
    codes = read(name, 0, None).reshape(-1)[begin // 2 : -(-end // 2)]
    table = read(f"{name}.quant_map", 0, None).astype(np.float32)
    pairs = np.stack([table[codes >> 4], table[codes & 15]], axis=-1).reshape(-1)
    values = pairs[begin % 2 : begin % 2 + end - begin]
    scales = read(f"{name}.absmax", 0, None)
    if is_nested:
        table = read(f"{name}.nested_quant_map", 0, None).astype(np.float32)
        outer = read(f"{name}.nested_absmax", 0, None).astype(np.float32)
        outer = np.repeat(outer, state.nested_blocksize)[: scales.size]
        scales = table[scales] * outer + np.float32(state.nested_offset)
    scales = np.repeat(scales.astype(np.float32)[first:last], state.blocksize)
    values = values * scales[begin - first * state.blocksize :][: end - begin]
    rows: Array = values.reshape(stop - start, *state.shape[1:])
    return rows


def _eight_bits(stored: StoredTensors, stem: str, scale: TensorInfo) -> Iterator[PackedTensor]:
    name = f"{stem}.weight"
    info = stored.part(name, None, ("i8",))
    if info is None:
        return
    stored.part(scale.name, info.shape[:1], FLOATS)
    if len(info.shape) != 2:
        shape = f"{list(info.shape)}"
        stored.problems.add("not a matrix", where=f"tensor {quoted(name)}", found=shape)
        return
    orders = [n for n in (f"{stem}.weight_format",) if n in stored.tensors]
    for order in orders:
        # Older files have orders of elements for one generation of GPUs.
        if np.any(stored.read(order, 0, None)):
            stored.problems.add(
                "the elements are not stored row by row",
                where=f"tensor {quoted(order)}",
                expected="0",
                hint="save the model again with a newer bitsandbytes",
            )
    rows = partial(_eight_bit_rows, name, scale.name)
    parts = (name, scale.name, *orders)
    yield PackedTensor(name, info.shape, "int8 (bitsandbytes)", parts, rows)


def _eight_bit_rows(name: str, scale: str, read: ReadRows, start: int, stop: int) -> Array:
    values = read(name, start, stop).astype(np.float32)
    values *= read(scale, start, stop).astype(np.float32)[:, None]
    # As bitsandbytes does, in two products, so that the last bits are the same.
    values *= np.float32(1 / 127)
    return values


# Elements of eight bits with scales: of blocks (DeepSeek, Qwen), of rows or of the matrix.
#
# An element is its eight-bit value, a float or an integer, times the scale of its block.


_EIGHT_BITS = {"f8e4m3fn": "FP8", "f8e5m2": "FP8", "i8": "int8"}
_BYTE_VALUES = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True)
class _Fp8Options:
    """The options of weights in eight bits; compressed-tensors states blocks by groups."""

    weight_block_size: (
        Annotated[tuple[Positive, ...], Check(lambda sizes: len(sizes) == 2, "[rows, columns]")]
        | None
    ) = None
    config_groups: Json = field(default_factory=dict)


def find_fp8(stored: StoredTensors) -> Iterator[PackedTensor]:
    """Yield every tensor of eight bits, with its scales."""
    blocks = _block_sizes(stored)
    for name, info in stored.tensors.items():
        if info.dtype.name not in _EIGHT_BITS or name.endswith("_scale"):
            continue
        names = (name + "_scale_inv", name + "_scale")
        scale = stored.part(next((n for n in names if n in stored.tensors), names[1]), None, FLOATS)
        if scale is None:
            continue
        sizes = _scaled_sizes(info, scale, blocks)
        if sizes is None:
            block_text = f"blocks of {blocks[0]} x {blocks[1]}" if blocks else "a row"
            stored.problems.add(
                "the scales do not match the matrix",
                where=f"{scale.file}, tensor {quoted(scale.name)}",
                expected=f"a scale for {block_text} of {list(info.shape)}",
                found=f"{list(scale.shape)}",
            )
            continue
        if (zeros := name + "_zero_point") in stored.tensors:
            stored.problems.add("zeros of elements of eight bits are not read",
                                where=f"{info.file}, tensor {quoted(zeros)}",
                                hint="quantise symmetrically, or in words")  # fmt: skip
        rows = partial(_fp8_rows, info, scale, sizes)
        storage = _EIGHT_BITS[info.dtype.name]
        yield PackedTensor(name, info.shape, storage, (name, scale.name), rows)


def _block_sizes(stored: StoredTensors) -> Shape | None:
    """Return rows and columns of a block, where the config states them."""
    options = stored.settings(_Fp8Options)
    if options.weight_block_size:
        return options.weight_block_size
    for group in options.config_groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        reader = RecordReader(lambda path: "config.json")
        sizes = {"weight_block_size": weights.get("block_structure")}
        blocks = reader.section(_Fp8Options, sizes, (KEY, "config_groups"), is_open=True)
        stored.problems.extend(problem for _, problem in reader.problems)
        return blocks.weight_block_size
    return None


def _scaled_sizes(info: TensorInfo, scale: TensorInfo, blocks: Shape | None) -> Shape | None:
    """Return rows and columns of a block, or None if the scales do not match the matrix."""
    if len(info.shape) < 2:
        return None
    *lead, rows, columns = info.shape
    if scale.shape in ((), (1,)):
        return rows, columns
    if scale.shape in ((*lead, rows), (*lead, rows, 1)):
        return 1, columns
    if blocks is None:
        return None
    counts = -(-rows // blocks[0]), -(-columns // blocks[1])
    return blocks if scale.shape == (*lead, *counts) else None


def _fp8_rows(
    info: TensorInfo,
    scale: TensorInfo,
    sizes: Shape,
    read: ReadRows,
    start: int,
    stop: int,
) -> Array:
    table = _BYTE_VALUES.view(info.dtype.numpy).astype(np.float32)
    values = table[read(info.name, start, stop).view(np.uint8)]
    is_single = scale.shape in ((), (1,))
    if len(info.shape) > 2:
        scales = read(scale.name, *((0, None) if is_single else (start, stop)))
        matrices = values.reshape(-1, *info.shape[-2:])
        for number, matrix in enumerate(matrices):
            matrix_scales = scales if is_single else scales.reshape(len(matrices), -1)[number]
            _scale_blocks(matrix, matrix_scales, sizes, 0)
        return values
    first, last = start // sizes[0], -(-stop // sizes[0])
    scales = read(scale.name, *((0, None) if is_single else (first, last)))
    _scale_blocks(values, scales, sizes, start)
    return values


def _scale_blocks(matrix: Array, scales: Array, sizes: Shape, start: int) -> None:
    """Multiply rows of a matrix, the first of which is row `start`, by the scales of its blocks."""
    high, wide = sizes
    rows = scales.astype(np.float32).reshape(-1, -(-matrix.shape[1] // wide))
    for number, row in enumerate(rows, start // high):
        begin, end = max(number * high - start, 0), (number + 1) * high - start
        matrix[begin:end] *= np.repeat(row, wide)[: matrix.shape[1]]


# GPTQ and AWQ: integers of a few bits, packed into words, with a scale and a zero for a group.
#
# Matrices are stored with their inputs first.  GPTQ packs along the inputs, AWQ along the outputs
# in an order of its own; the element is (integer - zero) x scale.  GPTQ's first format stores
# zero - 1.

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of the eight outputs in a word, which one is in each four bits, the lowest first."""


GroupSize = Annotated[
    int, Check(lambda size: 0 < size < 1 << 31 or size == -1, "a size, or -1 for a single group")
]


@dataclass(frozen=True)
class _GptqOptions:
    bits: Literal[2, 4, 8] = 4
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    group_size: GroupSize = 128


@dataclass(frozen=True)
class _AwqOptions:
    bits: Literal[4] = 4
    version: Literal["gemm", "GEMM"] = "gemm"
    zero_point: Literal[True] = True
    group_size: GroupSize = 128


@dataclass(frozen=True)
class _WordMatrix:
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
        words = read(f"{self.stem}.qzeros", 0, None)
        zeros = _unpack(words, self.bits, self.along_outputs)[:, start:stop]
        zeros = (zeros + self.added).astype(np.float32)
        groups = self._groups(read, len(scales))
        values = self._integers(read(f"{self.stem}.qweight", 0, None), start, stop)
        # In pieces, because zeros and scales of every input would be as large as the matrix.
        for column in range(0, self.inputs, 1024):
            piece = slice(column, column + 1024)
            values[piece] -= zeros[groups[piece]]
            values[piece] *= scales[groups[piece]]
        return np.ascontiguousarray(values.T)

    def _groups(self, read: ReadRows, count: int) -> Array:
        """Return the group of each input."""
        if not self.has_index:
            return np.arange(self.inputs) // self.group
        name = f"{self.stem}.g_idx"
        return _checked_groups(read(name, 0, None), count, name)

    def _integers(self, words: Array, start: int, stop: int) -> Array:
        """Return the integers of outputs [start, stop) as float32, ``[in, out]``."""
        values = np.empty((self.inputs, stop - start), np.float32)
        if self.along_outputs:
            for row in range(0, self.inputs, 1024):
                piece = _unpack(words[row : row + 1024], self.bits, True)
                values[row : row + 1024] = piece[:, start:stop]
            return values
        count, mask = _WORD // self.bits, (1 << self.bits) - 1
        columns = words[:, start:stop].view(np.uint32)
        for position in range(count):
            values[position::count] = (columns >> np.uint32(position * self.bits)) & mask
        return values


def _checked_groups(groups: Array, count: int, name: str) -> Array:
    """Return the group of each input, from a tensor. Raises InputError: there are only `count`."""
    if groups.size and (groups.min() < 0 or groups.max() >= count):
        raise InputError(
            "an input is in a group that does not exist",
            where=f"tensor {quoted(name)}",
            expected=f"0 to {count - 1}",
            found=f"{int(groups.min())} to {int(groups.max())}",
        )
    return groups


def _unpack(words: Array, bits: int, is_reordered: bool) -> Array:
    """Return the integers in each word of ``[rows, words]``, in their order along the last axis."""
    count, mask = _WORD // bits, (1 << bits) - 1
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(bits)
    integers = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(mask)
    if is_reordered:
        integers = integers[..., np.argsort(_AWQ_ORDER)]
    return integers.reshape(len(words), -1).astype(np.int32)


def find_gptq(stored: StoredTensors) -> Iterator[PackedTensor]:
    """Yield the matrices of a GPTQ checkpoint."""
    options = stored.settings(_GptqOptions)
    yield from _word_matrices(
        stored,
        "GPTQ",
        options.bits,
        options.group_size,
        1 if options.checkpoint_format == "gptq" else 0,
        False,
    )


def find_awq(stored: StoredTensors) -> Iterator[PackedTensor]:
    """Yield the matrices of an AWQ checkpoint."""
    options = stored.settings(_AwqOptions)
    yield from _word_matrices(stored, "AWQ", options.bits, options.group_size, 0, True)


def _word_matrices(
    stored: StoredTensors, scheme: str, bits: int, group: int, added: int, along_outputs: bool
) -> Iterator[PackedTensor]:
    word_types, per_word = ("i32", "u32"), _WORD // bits
    for stem, _ in stored.ending(".qweight"):
        weight = stored.part(f"{stem}.qweight", None, word_types)
        if weight is None:
            continue
        if len(weight.shape) != 2:
            where, shape = f"tensor {quoted(weight.name)}", f"{list(weight.shape)}"
            stored.problems.add("not a matrix of words", where=where, found=shape)
            continue
        inputs, outputs = weight.shape
        if along_outputs:
            outputs *= per_word
        else:
            inputs *= per_word
        group_inputs = group if group > 0 else max(inputs, 1)
        groups = -(-inputs // group_inputs)
        has_index = not along_outputs and f"{stem}.g_idx" in stored.tensors
        if has_index:
            # With an index, groups need not be of one size; the scales say how many there are.
            scales = stored.tensors.get(f"{stem}.scales")
            groups = scales.shape[0] if scales is not None and scales.shape else groups
        parts = [
            weight,
            stored.part(f"{stem}.qzeros", (groups, -(-outputs // per_word)), word_types),
            stored.part(f"{stem}.scales", (groups, outputs), FLOATS),
            *([stored.part(f"{stem}.g_idx", (inputs,), word_types)] if has_index else []),
        ]
        names = tuple(part.name for part in parts if part is not None)
        matrix = _WordMatrix(
            stem, inputs, outputs, bits, group_inputs, added, along_outputs, has_index
        )
        if len(names) == len(parts):
            storage = f"{scheme} {bits} bit"
            yield PackedTensor(f"{stem}.weight", (outputs, inputs), storage, names, matrix.rows)


# MXFP4: floats of four bits, 32 of which share a power of two (OCP microscaling, version 1.0).

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BYTES = 16
_BIAS = 127


def find_mxfp4(stored: StoredTensors) -> Iterator[PackedTensor]:
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
            yield PackedTensor(name, shape, "MXFP4", parts, partial(_mxfp4_rows, parts, shape))


def _four_bit_values(packed: Array) -> Array:
    """Return the two values in each byte, that of the lower bits first, along the last axis."""
    pairs = np.stack([_VALUES[packed & 15], _VALUES[packed >> 4]], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def _mxfp4_rows(
    parts: tuple[str, str], shape: Shape, read: ReadRows, start: int, stop: int
) -> Array:
    values = np.empty((stop - start, *shape[1:]), np.float32)
    # The blocks of all experts together, unpacked, would be several times as large.
    for expert in range(start, stop):
        packed = read(parts[0], expert, expert + 1)[0]
        powers = read(parts[1], expert, expert + 1)[0].astype(np.int32) - _BIAS
        scaled = np.ldexp(_four_bit_values(packed), powers[..., None])
        values[expert - start] = scaled.reshape(shape[2], shape[1]).T
    return values


# compressed-tensors and ModelOpt: four-bit floats whose scales have eight bits, and integers in
# words.
#
# NVFP4: 16 elements share a scale of eight bits, and all of them one in float32, by which
# compressed-tensors divides and ModelOpt multiplies.  MXFP4: 32 share a power of two.  Integers of
# four or eight bits lie in words, the lowest bits first, and are stored plus half their range;
# zeros likewise, along the outputs.


def find_compressed(stored: StoredTensors) -> Iterator[PackedTensor]:
    """Yield the matrices that compressed-tensors or ModelOpt wrote, of eight and of fewer bits."""
    for stem, packed in stored.ending(".weight_packed"):
        if packed.dtype.name == "i32":
            yield from _integer_words(stored, stem, packed)
        else:
            yield from _four_bit_floats(stored, stem, packed, f"{stem}.weight_global_scale")
    for stem, _ in stored.ending(".weight_scale_2"):
        if (weight := stored.part(f"{stem}.weight", None, ("u8",))) is not None:
            yield from _four_bit_floats(stored, stem, weight, f"{stem}.weight_scale_2")
    yield from find_fp8(stored)


def _four_bit_floats(
    stored: StoredTensors, stem: str, packed: TensorInfo, outer: str
) -> Iterator[PackedTensor]:
    if len(packed.shape) != 2 or stored.part(packed.name, None, ("u8",)) is None:
        return
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    if outer in stored.tensors:
        group, storage, types, names = 16, "NVFP4", ("f8e4m3fn",), [outer]
    else:
        group, storage, types, names = 32, "MXFP4", ("u8",), []
    scale = stored.part(f"{stem}.weight_scale", (outputs, -(-inputs // group)), types)
    parts = [scale, *(stored.part(name, None, ("f32",)) for name in names)]
    if None not in parts:
        parts_names = (packed.name, f"{stem}.weight_scale", *names)
        rows = partial(_four_bit_float_rows, parts_names, group)
        yield PackedTensor(f"{stem}.weight", (outputs, inputs), storage, parts_names, rows)


def _four_bit_float_rows(
    parts: tuple[str, ...], group: int, read: ReadRows, start: int, stop: int
) -> Array:
    packed, scales = read(parts[0], start, stop), read(parts[1], start, stop)
    if len(parts) == 2:
        scales = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS)
    else:
        outer = read(parts[2], 0, None).reshape(-1)[:1]
        scales = scales.astype(np.float32)
        scales = scales / outer if parts[2].endswith("_global_scale") else scales * outer
    values = _four_bit_values(packed)
    values *= np.repeat(scales, group, axis=1)[:, : values.shape[1]]
    return values


def _integer_words(stored: StoredTensors, stem: str, packed: TensorInfo) -> Iterator[PackedTensor]:
    shape_part = stored.part(f"{stem}.weight_shape", (2,), ("i64", "i32"))
    scale = stored.part(f"{stem}.weight_scale", None, FLOATS)
    if shape_part is None or scale is None:
        return
    outputs, inputs = map(int, stored.read(shape_part.name, 0, None))
    widths = [b for b in (4, 8) if packed.shape == (outputs, -(-inputs * b // _WORD))]
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == outputs else 0
    if not widths or not groups or inputs % groups:
        stored.problems.add(
            "the words and scales are not those of the matrix",
            where=f"{packed.file}, tensor {quoted(packed.name)}",
            expected=f"integers of 4 or 8 bits for {[outputs, inputs]}, and scales of its rows",
            found=f"{list(packed.shape)} words, {list(scale.shape)} scales",
        )
        return
    (bits,) = widths
    parts = [packed.name, scale.name, shape_part.name]
    for name, shape, types in (
        (f"{stem}.weight_zero_point", (-(-outputs * bits // _WORD), groups), ("i32",)),
        (f"{stem}.weight_g_idx", (inputs,), ("i32", "i64")),
    ):
        if name in stored.tensors and stored.part(name, shape, types) is None:
            return
        parts += [name] if name in stored.tensors else []
    rows = partial(_integer_rows, tuple(parts), bits, (inputs, groups))
    name, storage = f"{stem}.weight", f"int{bits} (compressed-tensors)"
    yield PackedTensor(name, (outputs, inputs), storage, tuple(parts), rows)


def _integer_rows(
    parts: tuple[str, ...], bits: int, sizes: tuple[int, int], read: ReadRows, start: int, stop: int
) -> Array:
    inputs, groups = sizes
    scales = read(parts[1], start, stop).astype(np.float32)
    zeros: Array | int = 1 << bits - 1
    index = np.arange(inputs) // (inputs // groups)
    for name in parts[3:]:
        if name.endswith("_g_idx"):
            index = _checked_groups(read(name, 0, None), groups, name)
        else:
            zeros = _unpack(read(name, 0, None).T, bits, False).T[start:stop][:, index]
    integers = _unpack(read(parts[0], start, stop), bits, False)[:, :inputs]
    values: Array = (integers - zeros).astype(np.float32)
    values *= scales[:, index]
    return values


# A folder of quantised safetensors, with the names, shapes and config of one that is not.

MAX_CACHED_BYTES = 256 << 20

METHODS: Mapping[str, Callable[[StoredTensors], Iterator[PackedTensor]]] = {
    "fp8": find_fp8,
    "fbgemm_fp8": find_fp8,
    "compressed-tensors": find_compressed,
    "modelopt": find_compressed,
    "mxfp4": find_mxfp4,
    "gptq": find_gptq,
    "awq": find_awq,
    "bitsandbytes": find_bitsandbytes,
}
"""The functions that yield the matrices of each ``quant_method``."""


class QuantisedFolder(DerivedCheckpoint):
    """A folder whose matrices are dequantised when they are read, as float32."""

    format = "safetensors"

    def __init__(self, folder: SafetensorsFolder, packed: Mapping[str, PackedTensor]) -> None:
        super().__init__(folder)
        self._packed = packed
        self._cache = threading.local()
        self.config = {key: value for key, value in folder.config.items() if key != KEY}
        parts = {part for tensor in packed.values() for part in tensor.parts}
        infos = {name: info for name, info in folder.tensors.items() if name not in parts}
        for name, tensor in packed.items():
            infos[name] = replace(
                folder.tensors[tensor.parts[0]],
                name=name,
                dtype=F32,
                shape=tensor.shape,
                nbytes=sum(folder.tensors[part].nbytes for part in tensor.parts),
                storage=tensor.storage,
            )
        self.tensors = MappingProxyType(infos)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; see `Checkpoint.read`."""
        tensor = self._packed.get(name)
        if tensor is None:
            return self.base.read(name, start, stop)
        rows_of(self.tensors[name], start, stop)
        stop = tensor.shape[0] if stop is None else stop
        # A scale that is not finite gives values that are not finite, which the caller checks.
        with np.errstate(all="ignore"):
            return tensor.rows(partial(self._part, tensor), start, stop)

    def _part(self, tensor: PackedTensor, name: str, start: int, stop: int | None) -> Array:
        """Read rows of a part; a thread caches those of the matrix that it reads.

        Outputs lie across the words of GPTQ and AWQ, so every block of rows needs all of them.
        """
        if (start, stop) != (0, None):
            return self.base.read(name, start, stop)
        if getattr(self._cache, "tensor", None) != tensor.name:
            self._cache.tensor, self._cache.parts = tensor.name, {}
        parts: dict[str, Array] = self._cache.parts
        if name in parts:
            return parts[name]
        part = self.base.read(name)
        if part.nbytes <= MAX_CACHED_BYTES:
            parts[name] = part
        return part

    def remarks(self) -> list[str]:
        """Return which matrices were quantised."""
        return quantised_remark(self.tensors)


def open_quantised(folder: SafetensorsFolder) -> QuantisedFolder:
    """Return an opened folder with ``quantization_config`` as one that is not quantised.

    Raises:
      InputError: the method is none that moecc reads, or the tensors do not match it; all problems.
    """
    problems = Problems()
    options = folder.config[KEY]
    method = options.get("quant_method") if isinstance(options, dict) else None
    find = METHODS.get(method) if isinstance(method, str) else None
    where = f"{folder.path / 'config.json'}: {KEY}"
    if not isinstance(options, dict) or find is None:
        raise InputError(
            "the weights are quantised by a method that moecc does not read",
            where=f"{where}.quant_method",
            expected=f"one of {', '.join(METHODS)}",
            found=describe(method),
            hint="take the checkpoint that is not quantised, or dequantise it with its own library",
        )
    stored = StoredTensors(folder.tensors, options, problems, folder.read)
    packed = {tensor.name: tensor for tensor in find(stored)}
    if not packed and not problems:
        problems.add(
            "the weights are said to be quantised, and no tensor is",
            where=where,
            found=describe(method),
            hint=f"if they are not quantised any more, remove {KEY}",
        )
    problems.raise_if_any()
    return QuantisedFolder(folder, packed)
