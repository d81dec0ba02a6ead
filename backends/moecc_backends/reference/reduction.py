"""The meaning of reductions and normalisations."""

from __future__ import annotations

import numpy as np

from moecc_backends.reference.arrays import Array, Data, meaning


def _reduced(x: Array, axes: tuple[str, ...], data: Data) -> Array:
    return Array(np.asarray(data), tuple(a for a in x.axes if a not in axes))


@meaning("sum")
def sum_(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return the sum over the axes."""
    return _reduced(x, axes, x.data.sum(x.positions(axes)))


@meaning("mean")
def mean(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return the mean over the axes."""
    return _reduced(x, axes, x.data.mean(x.positions(axes)))


@meaning("max")
def max_(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return the maximum over the axes."""
    return _reduced(x, axes, x.data.max(x.positions(axes)))


@meaning("logsumexp")
def logsumexp(x: Array, *, axes: tuple[str, ...]) -> Array:
    """Return log Σ exp(x) over the axes; −∞ where all are −∞."""
    top = _finite(x.data.max(x.positions(axes), keepdims=True))
    total = np.log(np.exp(x.data - top).sum(x.positions(axes), keepdims=True)) + top
    return _reduced(x, axes, total.squeeze(x.positions(axes)))


def normalised(data: Data, axis: int = -1) -> Data:
    """Return exp(data) over its sum along `axis`; zeros where all elements are −∞."""
    parts = np.exp(data - _finite(data.max(axis, keepdims=True)))
    total = parts.sum(axis, keepdims=True)
    return np.asarray(parts / np.where(total == 0, 1, total))


def _finite(top: Data) -> Data:
    # −∞ − (−∞) is undefined, so shift by any finite number instead.
    return np.where(top == -np.inf, 0, top)


@meaning("softmax")
def softmax(x: Array, *, axis: str) -> Array:
    """Return exp(x) over its sum along the axis; zeros where all elements are −∞ (masked)."""
    return x.map(lambda d: normalised(d, x.axes.index(axis)))


@meaning("rms_norm")
def rms_norm(x: Array, scale: Array, *, axis: str, eps: float) -> Array:
    """Return x / √(mean(x²) + eps) · scale (Zhang and Sennrich 2019)."""
    mean_square = np.square(x.data).mean(x.axes.index(axis), keepdims=True)
    return x.map(lambda d: d / np.sqrt(mean_square + eps) * scale.to(x.axes))


@meaning("layer_norm")
def layer_norm(x: Array, scale: Array, bias: Array, *, axis: str, eps: float) -> Array:
    """Return (x − mean) / √(variance + eps) · scale + bias (Ba et al. 2016)."""
    at = x.axes.index(axis)
    centred = x.data - x.data.mean(at, keepdims=True)
    variance = np.square(centred).mean(at, keepdims=True)
    unit = centred / np.sqrt(variance + eps)
    return x.map(lambda _: unit * scale.to(x.axes) + bias.to(x.axes))
