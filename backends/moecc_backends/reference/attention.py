"""The meaning of rotary and relative positions and of causal masks.

The scalings of the frequencies are those that checkpoints of Hugging Face transformers are
trained with: linear (kaiokendev), dynamic NTK (bloc97, emozilla), llama3 (Llama 3.1), YaRN
(Peng et al. 2023) and LongRoPE (Ding et al. 2024).
"""

from __future__ import annotations

import math

import numpy as np

from moecc.ir.attributes import RopeAttrs
from moecc_backends.reference.arrays import Array, Data, meaning


@meaning("rope")
def rope(positions: Array, *, axis: str, size: int, **scaling: object) -> tuple[Array, Array]:
    """Return cosines and sines of position times frequency; the second half repeats the first."""
    attrs = RopeAttrs.of_attrs({"axis": axis, "size": size, **scaling})
    length = int(positions.data.max(initial=0)) + 1
    half = positions.data[..., None] * frequencies(size, length, attrs)
    angles = np.concatenate([half, half], -1)
    axes = (*positions.axes, axis)
    factor = attrs.attention_factor
    return Array(np.cos(angles) * factor, axes), Array(np.sin(angles) * factor, axes)


def frequencies(size: int, length: int, scaling: RopeAttrs) -> Data:
    """Return the angle per position of each pair of entries, ``[size / 2]``.

    Args:
      size: the head dimension.
      length: the number of positions, on which dynamic scaling and longrope depend.
      scaling: the attributes of ``rope``.
    """
    kind, factor = scaling.scaling, scaling.factor
    theta = scaling.theta
    if kind == "dynamic":
        theta *= _dynamic_stretch(size, length, factor, scaling.original_context)
    plain = np.asarray(theta ** -(np.arange(0, size, 2) / size))
    if kind == "linear":
        return np.asarray(plain / factor)
    if kind == "llama3":
        return _llama3(plain, scaling)
    if kind == "longrope":
        long = length > scaling.original_context
        return np.asarray(
            plain / np.asarray(scaling.long_factors if long else scaling.short_factors)
        )
    if kind == "yarn":
        keep = 1 - _yarn_ramp(size, scaling)
        return np.asarray(plain / factor * (1 - keep) + plain * keep)
    return plain


def _dynamic_stretch(size: int, length: int, factor: float, context: int) -> float:
    """Return the factor on theta at `length` positions; 1 within the original context."""
    grown = factor * max(length, context) / context - (factor - 1)
    return float(grown ** (size / (size - 2)))


def _llama3(plain: Data, scaling: RopeAttrs) -> Data:
    """Divide slow frequencies by the factor, keep fast ones, interpolate in between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(plain / scaling.factor * (1 - keep) + plain * keep)


def _yarn_ramp(size: int, scaling: RopeAttrs) -> Data:
    """Return 0 where a frequency is kept, 1 where it is divided, and a ramp between."""
    first = _yarn_entry(scaling.beta_fast, size, scaling)
    last = _yarn_entry(scaling.beta_slow, size, scaling)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first if last != first else 0.001
    return np.asarray(np.clip((np.arange(size // 2) - first) / width, 0, 1))


def _yarn_entry(turns: float, size: int, scaling: RopeAttrs) -> float:
    """Return the entry, as a real number, with `turns` rotations in the original context."""
    wavelength = scaling.original_context / (turns * 2 * math.pi)
    return size * math.log(wavelength) / (2 * math.log(scaling.theta))


@meaning("rotate")
def rotate(x: Array, cos: Array, sin: Array, *, axis: str) -> Array:
    """Return x · cos + (−second half, first half) · sin along the axis."""
    at = x.axes.index(axis)
    first, second = np.split(x.data, 2, at)
    turned = np.concatenate([-second, first], at)
    return x.map(lambda d: d * cos.to(x.axes) + turned * sin.to(x.axes))


@meaning("causal")
def causal(query: Array, key: Array, *, window: int) -> Array:
    """Return whether key ≤ query, and query − key < window if there is one."""
    return seen_from(query, key, window)


def seen_from(query: Array, key: Array, window: int) -> Array:
    """Return which keys a query sees, by their positions."""
    axes = _crossed(query, key)
    behind = query.to(axes) - key.to(axes)
    seen = behind >= 0
    if window:
        seen &= behind < window
    return Array(np.asarray(seen), axes)


def _crossed(query: Array, key: Array) -> tuple[str, ...]:
    """Return the axes of queries and keys, each once."""
    return (*query.axes, *(a for a in key.axes if a not in query.axes))


@meaning("same_segment")
def same_segment(query: Array, key: Array) -> Array:
    """Return whether query = key, or the query is 0."""
    return in_segment(query, key)


def in_segment(query: Array, key: Array) -> Array:
    """Return which keys a query sees, by their segments."""
    axes = _crossed(query, key)
    queries, keys = query.to(axes), key.to(axes)
    return Array(np.asarray((queries == keys) | (queries == 0)), axes)


@meaning("relative_buckets")
def relative_buckets(
    query: Array, key: Array, *, bidirectional: bool, buckets: int, max_distance: int
) -> Array:
    """Return the bucket of each distance from query to key (T5, Raffel et al. 2020)."""
    axes = _crossed(query, key)
    ahead = key.to(axes) - query.to(axes)
    if not bidirectional:
        return Array(_distance_buckets(np.maximum(-ahead, 0), buckets, max_distance), axes)
    half = buckets // 2
    near = _distance_buckets(np.abs(ahead), half, max_distance)
    return Array(np.where(ahead > 0, half + near, near), axes)


def _distance_buckets(distance: Data, count: int, furthest: int) -> Data:
    """Return the bucket of each distance, of `count` buckets, half of them exact."""
    exact = count // 2
    growth = np.log(np.maximum(distance, 1) / exact) / math.log(furthest / exact)
    # Rounding of logarithms must not decide where the quotient is an integer.
    far = exact + np.floor(growth * (count - exact) + 1e-9).astype(int)
    return np.where(distance < exact, distance, np.minimum(far, count - 1))
