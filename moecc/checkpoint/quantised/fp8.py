"""Eight-bit floats with scales: of blocks (DeepSeek, Qwen), of rows or of a whole matrix.

An element is its eight-bit value times the scale of its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from moecc.checkpoint.problems import describe, quoted
from moecc.checkpoint.quantised.packed import FLOATS, Packed, ReadRows, Stored
from moecc.checkpoint.source import TensorInfo
from moecc.types.arrays import Array

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
