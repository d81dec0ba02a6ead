"""Rotary and relative positions, causal masks; attention is contract, mask and softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import (
    axis_of,
    mixes_axis,
    need_float,
    need_kind,
    no_duplicates,
    no_ragged,
    same_size,
    widest,
)
from moecc.ir.table.sharding import by_name
from moecc.ir.traits import Residual
from moecc.types.dtypes import F32, I32, PRED
from moecc.types.tensor import Axis, TensorType


def _infer_rope(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    positions = operands[0].type
    need_kind(positions, "int", "the positions")
    if attrs["size"] <= 0 or attrs["size"] % 2:
        raise InputError("rotary tables have an even number of entries", found=str(attrs["size"]))
    for rule, holds in _scaling_rules(attrs):
        if not holds:
            raise InputError(f"rope scaling {attrs['scaling']} is not defined", expected=rule)
    axes = no_duplicates((*positions.axes, Axis(attrs["axis"], attrs["size"])))
    return (TensorType(F32, axes), TensorType(F32, axes))


def _scaling_rules(attrs: Attrs) -> Iterator[tuple[str, bool]]:
    """Yield the conditions on the attributes of ``rope``, and whether each holds."""
    kind, theta = attrs["scaling"], attrs["theta"]
    least = 1 if kind == "yarn" else 0
    yield f"theta above {least}", least < theta < math.inf
    yield "a positive factor", 0 < attrs["factor"] < math.inf
    yield "a finite attention_factor", math.isfinite(attrs["attention_factor"])
    if kind in ("dynamic", "llama3", "yarn", "longrope"):
        yield "original_context of at least 1", attrs["original_context"] >= 1
    if kind == "dynamic":
        yield "more than two entries, for the exponent size / (size − 2)", attrs["size"] > 2
    if kind == "llama3":
        low, high = attrs["low_freq_factor"], attrs["high_freq_factor"]
        yield "low_freq_factor below high_freq_factor", 0 < low < high < math.inf
    if kind == "yarn":
        slow, fast = attrs["beta_slow"], attrs["beta_fast"]
        yield "beta_slow not above beta_fast", 0 < slow <= fast < math.inf
    for name in ("short_factors", "long_factors"):
        many = attrs["size"] // 2 if kind == "longrope" else 0
        yield (
            f"{many} positive {name}",
            len(attrs[name]) == many and min(attrs[name], default=1) > 0,
        )


def _mixes_positions(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    # Some scalings read the largest position of all.
    return operands[0].type.names if attrs["scaling"] in LENGTH_SCALINGS else ()


ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LENGTH_SCALINGS = ("dynamic", "longrope")
"""Those whose frequencies depend on the length of the sequence."""

register(
    OpDef(
        "rope",
        "Tables of cosines and sines for rotary positions, both halves alike (Su et al. 2021).",
        ("positions",),
        _infer_rope,
        results=("cos", "sin"),
        attrs={
            "axis": Attr("axis", doc="the new axis"),
            "size": Attr("int", doc="its size, the head dimension", shrinks=True),
            "theta": Attr("float", 10000.0, doc="the base of the frequencies"),
            "scaling": Attr("str", "default", ROPE_SCALINGS, doc="how the frequencies are scaled"),
            "factor": Attr("float", 1.0, doc="the scaling factor"),
            "original_context": Attr("int", 0, doc="the context length before scaling"),
            "low_freq_factor": Attr("float", 1.0, doc="llama3"),
            "high_freq_factor": Attr("float", 4.0, doc="llama3"),
            "beta_fast": Attr("float", 32.0, doc="yarn"),
            "beta_slow": Attr("float", 1.0, doc="yarn"),
            "truncate": Attr("bool", True, doc="yarn: whether its bounds are rounded to integers"),
            "attention_factor": Attr("float", 1.0, doc="what both tables are multiplied by"),
            "short_factors": Attr("numbers", (), doc="longrope: divisors up to original_context"),
            "long_factors": Attr("numbers", (), doc="longrope: divisors for longer sequences"),
        },
        mixes=_mixes_positions,
        sharding=by_name,
    )
)


def _infer_rotate(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, cos, sin = (v.type for v in operands)
    for type in (x, cos, sin):
        need_float(type)
    size = axis_of(x, attrs["axis"]).size
    no_ragged(x, (attrs["axis"],), "cannot rotate")
    if not isinstance(size, int) or size % 2:
        raise InputError("only an even number of entries is rotated", found=str(x))
    wide = widest((x, cos, sin))
    if wide.names != x.names or attrs["axis"] not in cos or attrs["axis"] not in sin:
        raise InputError(
            "the tables must lie within the rotated value and have its axis",
            expected=f"axes of {x}",
            found=f"{cos} and {sin}",
        )
    return (x,)


register(
    OpDef(
        "rotate",
        "x · cos + rotate_half(x) · sin along an axis; the halves are paired, as in GPT-NeoX.",
        ("x", "cos", "sin"),
        _infer_rotate,
        attrs={"axis": Attr("axis", doc="the axis")},
        mixes=mixes_axis,
        linear=(0,),
        residual=Residual((1, 2), of=(0,)),
        sharding=by_name,
    )
)


def _crossed(operands: Sequence[Operand], what: str) -> tuple[Axis, ...]:
    """Return the axes of queries and keys; those of one name are matched, others crossed."""
    query, key = (v.type for v in operands)
    need_kind(query, "int", f"the {what} of the queries")
    need_kind(key, "int", f"the {what} of the keys")
    for axis in key.axes:
        if axis.name in query:
            same_size(query[axis.name], axis)
    return (*query.axes, *(axis for axis in key.axes if axis.name not in query))


def _infer_causal(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    return (TensorType(PRED, _crossed(operands, "positions")),)


register(
    OpDef(
        "causal",
        """Whether a query may see a key: key ≤ query, and query − key < window if there is one.

        Axes of one name are matched, others crossed: each text of a batch may have positions of
        its own.""",
        ("query", "key"),
        _infer_causal,
        attrs={"window": Attr("int", 0, doc="the sliding window in tokens; 0: none")},
        sharding=by_name,
    )
)


def _infer_same_segment(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    return (TensorType(PRED, _crossed(operands, "segments")),)


register(
    OpDef(
        "same_segment",
        """Whether a query may see a key: both are of one segment, or the query is padding.

        A segment is a document of several that are packed into a sequence; padding is segment 0.
        What padding sees is of no use, but a query that sees nothing would have no weights.  Axes
        of one name are matched, others crossed.""",
        ("query", "key"),
        _infer_same_segment,
        sharding=by_name,
    )
)


def bucket_starts(attrs: Attrs) -> tuple[int, ...]:
    """Return for each bucket of one direction but the first the smallest distance in it.

    Half of the buckets hold one distance each.  The others grow geometrically: with e exact ones
    of n, bucket e + m starts at e · (max_distance / e)^(m / (n − e)), made whole upwards (T5,
    Raffel et al. 2020, §2.1, and its code).  Powers of whole numbers are compared, not logarithms,
    so no rounding decides.

    Args:
      attrs: of a ``relative_buckets`` node.
    """
    count = attrs["buckets"] // 2 if attrs["bidirectional"] else attrs["buckets"]
    exact, furthest = count // 2, attrs["max_distance"]
    starts, rest = list(range(1, exact + 1)), count - exact
    for step in range(1, rest):
        distance = starts[-1]
        while distance**rest < furthest**step * exact ** (rest - step):
            distance += 1
        starts.append(distance)
    return tuple(starts)


def _infer_relative_buckets(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    axes = _crossed(operands, "positions")
    buckets, directions = attrs["buckets"], 2 if attrs["bidirectional"] else 1
    if buckets % directions or buckets // directions < 2:
        expected = "at least 2, or with both directions an even number of at least 4"
        raise InputError("too few buckets, or an odd number", expected=expected, found=str(buckets))
    if not buckets // directions // 2 < attrs["max_distance"] <= MOST_DISTANCE:
        expected = f"more than {buckets // directions // 2}, at most {MOST_DISTANCE}"
        what = "max_distance is out of range for the buckets"
        raise InputError(what, expected=expected, found=str(attrs["max_distance"]))
    return (TensorType(I32, axes),)


MOST_DISTANCE = 1 << 16

register(
    OpDef(
        "relative_buckets",
        """The bucket of each distance from query to key, nearby ones exact, far ones geometric.

        Without `bidirectional`, keys behind the query have buckets by their distance and all keys
        ahead share bucket 0.  With it, keys ahead have the second half of the buckets.  T5 looks
        up its attention bias by them (Raffel et al. 2020).  Axes are matched and crossed as by
        `causal`.""",
        ("query", "key"),
        _infer_relative_buckets,
        attrs={
            "bidirectional": Attr("bool", doc="whether keys ahead have buckets of their own"),
            "buckets": Attr("int", 32, doc="the number of buckets, of both directions together"),
            "max_distance": Attr("int", 128, doc="the distance from which on all share one bucket"),
        },
        sharding=by_name,
    )
)
