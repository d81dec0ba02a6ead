"""The multiplications of a convolution in HLO, which is how a TPU spells a dot.

A batch axis of a dot may come back as a spatial axis, with padding and dilation chosen such that
each output meets one input: the product of all sizes would count what is multiplied with padding.
"""

from __future__ import annotations

import re
from functools import cache
from math import prod

import numpy as np

from moecc_backends.xla.aot.hlo import Computation, Instruction

_FIELDS = ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")


def convolution_flops(where: Computation, made: Instruction) -> int:
    """Return 2 · products of the convolution `made` in `where`, those with padding left out.

    With output features and batch from the result and input features from the kernel, grouped
    convolutions need no case of their own.
    """
    left, kernel = (where.operand(made, i).shapes[0].sizes for i in (0, 1))
    out = made.shapes[0].sizes
    labels = re.split(r"_|->", made.attribute("dim_labels"))
    left_at, kernel_at, out_at = ({c: i for i, c in enumerate(text)} for text in labels)
    window = _window(made.attribute("window"))
    spatial = sorted(c for c in out_at if c.isdigit())
    pairs = (
        _pairs(left[left_at[c]], kernel[kernel_at[c]], out[out_at[c]], *_along(window, int(c)))
        for c in spatial
    )
    features = kernel[kernel_at["i"]] * out[out_at["f"]] * out[out_at["b"]]
    return 2 * features * prod(pairs)


def _window(text: str) -> dict[str, list[str]]:
    found = dict(re.findall(r"(\w+)=([\w\-]+)", text))
    return {name: found[name].split("x") for name in _FIELDS if name in found}


def _along(window: dict[str, list[str]], axis: int) -> tuple[int, int, int, int]:
    """Return stride, low padding, and the dilations of input and kernel along one axis."""

    def entry(name: str) -> int:
        return int(window[name][axis]) if name in window else 1

    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    return entry("stride"), low, entry("lhs_dilate"), entry("rhs_dilate")


@cache
def _pairs(
    size: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Return how many pairs of output and kernel entries meet an input that is there."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilate - low
    is_there = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
    return int(is_there.sum())
