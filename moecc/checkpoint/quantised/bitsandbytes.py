"""bitsandbytes: matrices of four bits with a table of values, and of eight bits with a row's scale.

Four bits: 64 elements (or as stated) share a scale, which may itself be stored in eight bits with a
table; element = table[code] x scale.  Eight bits: element = integer x scale of its row / 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from moecc.checkpoint.jsonfile import parse_json
from moecc.checkpoint.problems import describe, quoted
from moecc.checkpoint.quantised.packed import FLOATS, Packed, ReadRows, Stored
from moecc.checkpoint.source import TensorInfo
from moecc.errors import InputError
from moecc.types.arrays import Array

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
