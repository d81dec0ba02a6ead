"""Rotary and relative positions, causal masks; attention is contract, mask and softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from math import inf, isfinite

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.contraction import contract_type
from moecc.ir.table.rules import (
    axis_of,
    by_name,
    mixes_axis,
    need_float,
    need_kind,
    no_duplicates,
    no_ragged,
    same_dtype,
    same_size,
    widest,
)
from moecc.ir.traits import Residual
from moecc.types import F32, I32, PRED, Axis, TensorType


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


# Attention as one operation, whose scores need never be stored.

GIVEN = ("bias", "sinks", "keep", "query_segments", "key_segments")
"""Further operands of ``attention``, by the words of its attribute ``given``."""

_PAIR = ("query_segments", "key_segments")


def further_operands(operands: Sequence[Operand], attrs: Attrs) -> dict[str, Operand]:
    """Return the operands of an ``attention`` after its first three, by word.

    Raises:
      InputError: there are more or fewer operands than words.
    """
    words: tuple[str, ...] = attrs["given"]
    more = operands[3:]
    if len(words) != len(more):
        raise InputError(
            "each operand after the values has its word in given",
            expected=f"{len(words)} more: {', '.join(words)}" if words else "no more operands",
            found=", ".join(f"%{v.name}" for v in more) or "none",
        )
    return dict(zip(words, more, strict=True))


def scores_type(query: TensorType, key: TensorType, attrs: Attrs) -> TensorType:
    """Return the type that the scores of an ``attention`` would have.

    Raises:
      InputError: queries and keys have no scores along the axes of the attributes.
    """
    axis_of(key, attrs["along"], "the key")
    if attrs["along"] in query:
        raise InputError(
            f"queries and keys share the axis {attrs['along']!r}, along which keys are",
            found=str(query),
            hint="rename that of the keys and values",
        )
    return contract_type(query, key, (attrs["over"],))


def _infer(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    query, key, value = (v.type for v in operands[:3])
    _check_operands(operands)
    _check_numbers(attrs)
    scores = scores_type(query, key, attrs)
    same_dtype((query, value))
    for axis in attrs["causal"]:
        _check_causal(scores, axis, attrs)
    _check_further(further_operands(operands, attrs), scores, attrs)
    return (contract_type(scores, value, (attrs["along"],)),)


def _check_operands(operands: Sequence[Operand]) -> None:
    for operand in operands:
        if operand.type.extents:
            raise InputError(
                "the rows of experts attend to nothing",
                found=f"%{operand.name} : {operand.type}",
                hint="combine the rows first",
            )


def _check_numbers(attrs: Attrs) -> None:
    if not isfinite(attrs["scale"]):
        raise InputError("scale must be a finite number", found=str(attrs["scale"]))
    if not 0 <= attrs["cap"] < inf:
        raise InputError(
            "cap must be a finite number, 0 for none, or above", found=str(attrs["cap"])
        )
    if len(attrs["causal"]) > 1:
        raise InputError(
            "queries are in order along one axis",
            expected="at most one axis in causal",
            found=", ".join(attrs["causal"]),
        )
    if attrs["window"] < 0 or (attrs["window"] and not attrs["causal"]):
        raise InputError(
            "a window is that of a causal attention",
            expected="window=0, or above with causal",
            found=f"window={attrs['window']}, causal={', '.join(attrs['causal']) or '()'}",
        )


def _check_causal(scores: TensorType, axis: str, attrs: Attrs) -> None:
    axis_of(scores, axis, "the scores")
    if axis == attrs["along"]:
        raise InputError("causal names the axis of the queries", expected=str(scores), found=axis)


def _check_further(given: dict[str, Operand], scores: TensorType, attrs: Attrs) -> None:
    by_query = scores.without(attrs["along"])
    if "bias" in given:
        same_dtype((scores, given["bias"].type))
        widest((scores, given["bias"].type))
    if "sinks" in given:
        need_float(given["sinks"].type, "the sinks")
        same_dtype((scores, given["sinks"].type))
        _check_within(given["sinks"].type, by_query, "the sinks")
    if "keep" in given:
        need_kind(given["keep"].type, "bool", "what is kept")
        _check_within(given["keep"].type, scores, "what is kept")
    if len(given.keys() & set(_PAIR)) == 1:
        raise InputError(
            "segments are those of queries and of keys",
            expected=", ".join(_PAIR),
            found=", ".join(given.keys() & set(_PAIR)),
        )
    if _PAIR[0] in given:
        for word, within in zip(_PAIR, (by_query, scores), strict=True):
            need_kind(given[word].type, "int", word)
            _check_within(given[word].type, within, word)


def _check_within(type: TensorType, scores: TensorType, what: str) -> None:
    for axis in type.axes:
        if axis.name not in scores:
            raise InputError(
                f"{what} must have axes of the scores", expected=str(scores), found=str(type)
            )
    widest((scores, type))


DOC = """Values averaged by the softmax of query · key, without scores in memory.

        Scores are the sum over `over` of query · key, times `scale`, then cap · tanh(scores / cap)
        if there is a cap, then with `bias` added.  A query sees a key along `along` if `causal` is
        empty or the index of the key is at most its own along that axis, and with a window above
        its own less the window; if `keep` holds; and if both are of one segment, or the query's is
        0 (padding).  The softmax along `along` is over what is seen, and over the `sinks`, scores
        that no value belongs to.  Where nothing is seen the result is 0.

        Further operands have words in `given`, in their order.  Each has axes of the scores;
        `sinks` and `query_segments` without `along`."""

register(
    OpDef(
        "attention",
        DOC,
        ("query", "key", "value"),
        _infer,
        attrs={
            "over": Attr("axis", doc="the axis of queries and keys that is summed over"),
            "along": Attr("axis", doc="the axis of keys and values that the softmax runs along"),
            "scale": Attr("float", 1.0, doc="the factor on the products"),
            "cap": Attr("float", 0.0, doc="the soft cap of the scores; 0: none"),
            "causal": Attr("axes", (), doc="the axis of queries that see no later keys; (): all"),
            "window": Attr("int", 0, doc="how many keys a query sees, itself included; 0: all"),
            "given": Attr("words", (), GIVEN, doc="the further operands"),
        },
        results=("mixed",),
        mixes=lambda _operands, attrs: (attrs["over"], attrs["along"], *attrs["causal"]),
        linear=(2,),
        variadic=True,
        attends=True,
        residual=Residual((0, 1, 2)),
        sharding=by_name,
    )
)
