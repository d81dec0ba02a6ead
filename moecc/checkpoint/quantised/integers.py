"""GPTQ and AWQ: integers of a few bits, packed into words, with a scale and a zero for a group.

Matrices are stored with their inputs first.  GPTQ packs along the inputs, AWQ along the outputs in
an order of its own; the element is (integer - zero) x scale.  GPTQ's first format stores zero - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moecc.checkpoint.problems import quoted
from moecc.checkpoint.quantised.packed import FLOATS, Packed, ReadRows, Stored
from moecc.errors import InputError
from moecc.types.arrays import Array

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
