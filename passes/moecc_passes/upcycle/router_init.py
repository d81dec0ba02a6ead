"""The weights of new routers: drawn from scratch, in one of several ways."""

from __future__ import annotations

from math import erf, exp, pi, sqrt

from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType
from moecc.weights.draws import Normal, TruncatedNormal, Uniform
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Merge, Tile
from moecc_passes.upcycle.lift import Division


def router_weight(
    init: str, std: float, embed: Axis, division: Division, *, key: int, name: str = "expert"
) -> Expr:
    """Return the router's rows: one draw a group, repeated for the slices of the group.

    Args:
      init: normal, truncated-normal, switch, uniform or zero.
      std: the standard deviation of the entries.
      embed: the axis of the model's width.
      division: the numbers of groups and slices.
      key: the key of the draw.
      name: the name of the axis of experts.
    """
    copies = Axis(name if division.slices == 1 else "copy", division.copies)
    draw = _drawn(init, std, TensorType(F32, (copies, embed)), key)
    return draw if division.slices == 1 else repeated(draw, division.slices, name)


def repeated(rows: Expr, slices: int, name: str = "expert") -> Expr:
    """Return rows ``[copy, embed]``, each for all the slices of its group, over an axis `name`."""
    return Merge(Tile(rows, "part", slices, position=1), ("copy", "part"), name)


def slot_weight(init: str, std: float, embed: Axis, experts: int, slots: int, *, key: int) -> Expr:
    """Return the weight ``[expert, slot, embed]`` that makes the slots of a soft mixture."""
    axes = (Axis("expert", experts), Axis("slot", slots), embed)
    return _drawn(init, std, TensorType(F32, axes), key)


BOUNDS = {"truncated-normal": 3.0, "switch": 2.0}
"""Truncation bounds of draws, in standard deviations; Switch's are TensorFlow's."""


def left_of_std(init: str) -> float:
    """Return the ratio of the standard deviation of ``init`` after truncation to that before.

    The variance of a normal distribution cut at b is 1 − 2 b φ(b) / (2 Φ(b) − 1).
    """
    if init not in BOUNDS:
        return 1.0
    b = BOUNDS[init]
    density = exp(-b * b / 2) / sqrt(2 * pi)
    return sqrt(1 - 2 * b * density / erf(b / sqrt(2)))


def _drawn(init: str, std: float, type: TensorType, key: int) -> Expr:
    if init == "zero" or std == 0:
        return Full(0.0, type)
    if init == "uniform":
        # A uniform distribution on [−a, a] has the standard deviation a / √3.
        bound = std * 3**0.5
        return Uniform(type, low=-bound, high=bound, key=key)
    if init in BOUNDS:
        return TruncatedNormal(type, std=std, key=key, bound=BOUNDS[init])
    return Normal(type, std=std, mean=0.0, key=key)
