"""Random numbers: a key is an operand, and the numbers follow from it and from the place alone.

They are those of counter-based Threefry-2x32, the same in every backend.
"""

from __future__ import annotations

import math
from math import isfinite, prod

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data
from moecc.ir.operand import Operand
from moecc.ir.operation import Float, Int, Op, operation
from moecc.ir.ops.rules import by_place, need_kind, no_ragged
from moecc.support.lazy import np
from moecc.types import F32, KEY, TensorType

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: int, counts: Data) -> Data:
    """Return 64 bits for each count, by Threefry-2x32 in 20 rounds (Salmon et al. 2011).

    Args:
      key: 64 bits.
      counts: 64-bit counts, of any shape.
    """
    keys = [np.uint32(key >> 32), np.uint32(key & 0xFFFFFFFF)]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(_PARITY))
    counts = np.atleast_1d(counts).astype(np.uint64)
    a = (counts >> np.uint64(32)).astype(np.uint32) + keys[0]
    b = (counts & np.uint64(0xFFFFFFFF)).astype(np.uint32) + keys[1]
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            a = a + b
            b = ((b << np.uint32(by)) | (b >> np.uint32(32 - by))) ^ a
        a = a + keys[(turn + 1) % 3]
        b = b + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return (a.astype(np.uint64) << np.uint64(32)) | b.astype(np.uint64)


def folded(key: int, by: int) -> int:
    """Return another key, derived from `key` and the number `by`."""
    return int(threefry(key, np.asarray(by))[0])


def uniform(key: int, shape: tuple[int, ...]) -> Data:
    """Return numbers on [0, 1) with 23 bits, one for each element in row-major order."""
    words = threefry(key, np.arange(prod(shape)))
    bits = (words >> np.uint64(32)) ^ (words & np.uint64(0xFFFFFFFF))
    return np.asarray((bits >> np.uint64(9)).astype(np.float64) / 2**23).reshape(shape)


def _need_key(type: TensorType) -> None:
    need_kind(type, "key", "the key")
    if type.axes:
        raise InputError("one key, without axes, makes the numbers", found=str(type))


@operation("fold_key", "key", results=("key",))
class FoldKeyOp(Op):
    """Another key, made of a key and a number; keys of different numbers are independent."""

    by = Int("the number, 0 to 2³² − 1")

    def infer(self, key: Operand) -> TensorType:
        _need_key(key.type)
        if not 0 <= self.by < 2**32:
            raise InputError("a key is folded by a number of 32 bits", found=str(self.by))
        return TensorType(KEY)

    def meaning(self, key: Array) -> Array:
        return Array(np.asarray(folded(int(key.data), self.by), np.uint64), ())


class _DrawOp(Op):
    """Independent numbers with the axes of the second operand."""

    def infer(self, key: Operand, like: Operand) -> TensorType:
        _need_key(key.type)
        no_ragged(like.type, like.type.names, "no random numbers")
        for name, value in self.attrs.items():
            if not isfinite(value):
                raise InputError(f"{name} must be finite", found=str(value))
        return like.type.with_dtype(like.type.dtype if like.type.dtype.is_float else F32)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        # As with positions, a number belongs to its place.
        return operands[1].type.names

    def meaning(self, key: Array, like: Array) -> Array:
        axes = tuple(sorted(like.axes))
        numbers = self.drawn(int(key.data), tuple(like.size(a) for a in axes))
        return Array(Array(numbers, axes).to(like.axes), like.axes)

    def drawn(self, key: int, shape: tuple[int, ...]) -> Data:
        """Return numbers of the distribution, in the order of their counts."""
        raise NotImplementedError


@operation("random_uniform", "key like", results=("uniform",), sharding=by_place)
class RandomUniformOp(_DrawOp):
    """Independent numbers, uniform on [low, high), with the axes of the second operand.

    The number at a place follows from the key and the place, with the axes in alphabetical
    order: it is 23 bits of Threefry-2x32 (Salmon et al. 2011), so no backend, order of axes
    or order of computation changes it.
    """

    low = Float("the least number", 0.0)
    high = Float("what they stay below", 1.0)

    def drawn(self, key: int, shape: tuple[int, ...]) -> Data:
        return self.low + uniform(key, shape) * (self.high - self.low)


@operation("random_normal", "key like", results=("normal",), sharding=by_place)
class RandomNormalOp(_DrawOp):
    """Independent normal numbers around zero, with the axes of the second operand.

    The number at a place follows from the key and the place as that of ``random_uniform``; two
    uniform numbers make one normal (Box and Muller 1958).
    """

    std = Float("the standard deviation", 1.0)

    def drawn(self, key: int, shape: tuple[int, ...]) -> Data:
        first, second = (uniform(folded(key, by), shape) for by in (0, 1))
        return np.asarray(self.std * np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second))
