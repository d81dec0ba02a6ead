"""Conversion between float types: exact where possible, else rounded once, ties to even."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecc.types.arrays import Array
from moecc.types.dtypes import BF16, F16, F32, F64, DType

_EXPONENT: dict[np.dtype[Any], Any] = {
    BF16.numpy: np.uint16(0x7F80),
    F16.numpy: np.uint16(0x7C00),
    F32.numpy: np.uint32(0x7F80_0000),
    F64.numpy: np.uint64(0x7FF0 << 48),
}
_BLOCK = 1 << 16


def widen(values: Array, dtype: DType) -> Array:
    """Return `values`, floats, in `dtype`, f32 or f64, without loss; always a copy."""
    if values.dtype == BF16.numpy and dtype is F32:
        # The bits of a bf16 are the upper half of those of the f32.
        bits = values.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(dtype.numpy)


def round_to(values: Array, dtype: DType) -> Array:
    """Return floats rounded to `dtype`, to nearest, ties to even; infinite where they overflow."""
    if values.dtype == dtype.numpy:
        return values
    if values.dtype == np.float64 and dtype not in (F32, F16):
        values = _round_to_odd(values)
    elif values.dtype.itemsize < 4:
        values = widen(values, F32)
    if dtype is BF16:
        return _to_bf16(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype.numpy)


def _to_bf16(values: Array) -> Array:
    """Round f32 to bf16; a NaN becomes the positive quiet one, whatever its sign and payload."""
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(BF16.numpy)
    if first_nonfinite(made) is not None:
        made[np.isnan(values)] = np.nan
    return made


def _round_to_odd(values: Array) -> Array:
    """Return f64 as f32, setting the last bit if inexact, so that rounding again is correct.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on
    Computers 57(4), 2008.
    """
    with np.errstate(over="ignore", under="ignore"):
        near = values.astype(np.float32)
    bits = np.atleast_1d(near).view(np.uint32)
    back, wanted = np.atleast_1d(near.astype(np.float64)), np.atleast_1d(values)
    even = (back != wanted) & (bits & np.uint32(1) == 0) & np.isfinite(wanted)
    above = np.abs(back) > np.abs(wanted)
    bits = np.where(even & above, bits - np.uint32(1), np.where(even, bits + np.uint32(1), bits))
    return bits.view(np.float32).reshape(values.shape)


def first_nonfinite(values: Array) -> int | None:
    """Return the row-major index of the first NaN or infinity of an array, or None.

    Element types without NaN and infinity have none.
    """
    if values.dtype.kind in "iub" or not values.size:
        return None
    flat = np.ascontiguousarray(values).reshape(-1)
    exponent = _EXPONENT.get(flat.dtype)
    if exponent is None:
        return _first(~np.isfinite(flat))
    bits = flat.view(exponent.dtype)
    sign = exponent.dtype.type(1 << (8 * exponent.dtype.itemsize - 1))
    signed = np.dtype(f"i{exponent.dtype.itemsize}")
    # Without the sign bit, a NaN or an infinity is at least the all-ones exponent: as a signed
    # number where it is positive, and where it is negative as an unsigned one.
    for at in range(0, bits.size, _BLOCK):
        block = bits[at : at + _BLOCK]
        if block.view(signed).max() >= exponent or block.max() >= exponent | sign:
            return at + int(np.argmax(block & ~sign >= exponent))
    return None


def _first(bad: Array) -> int | None:
    at = int(np.argmax(bad))
    return at if bad[at] else None
