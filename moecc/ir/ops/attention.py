"""Rotary and relative positions, causal masks; attention is contract, mask and softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from math import inf, isfinite

import numpy as np

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data, meaning
from moecc.ir.attributes import RopeAttrs
from moecc.ir.operand import Operand
from moecc.ir.operation import Attr, Attrs, OpDef, register
from moecc.ir.ops.contraction import contract_type, product
from moecc.ir.ops.rules import (
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


# The meaning of rotary and relative positions and of causal masks.
#
# The scalings of the frequencies are those that checkpoints of Hugging Face transformers are
# trained with: linear (kaiokendev), dynamic NTK (bloc97, emozilla), llama3 (Llama 3.1), YaRN
# (Peng et al. 2023) and LongRoPE (Ding et al. 2024).


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
    axes = _attention_crossed(query, key)
    behind = query.to(axes) - key.to(axes)
    seen = behind >= 0
    if window:
        seen &= behind < window
    return Array(np.asarray(seen), axes)


def _attention_crossed(query: Array, key: Array) -> tuple[str, ...]:
    """Return the axes of queries and keys, each once."""
    return (*query.axes, *(a for a in key.axes if a not in query.axes))


@meaning("same_segment")
def same_segment(query: Array, key: Array) -> Array:
    """Return whether query = key, or the query is 0."""
    return in_segment(query, key)


def in_segment(query: Array, key: Array) -> Array:
    """Return which keys a query sees, by their segments."""
    axes = _attention_crossed(query, key)
    queries, keys = query.to(axes), key.to(axes)
    return Array(np.asarray((queries == keys) | (queries == 0)), axes)


@meaning("relative_buckets")
def relative_buckets(
    query: Array, key: Array, *, bidirectional: bool, buckets: int, max_distance: int
) -> Array:
    """Return the bucket of each distance from query to key (T5, Raffel et al. 2020)."""
    axes = _attention_crossed(query, key)
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


# The meaning of attention as one operation.


@meaning("attention")
def attention(
    query: Array,
    key: Array,
    value: Array,
    *more: Array,
    over: str,
    along: str,
    scale: float,
    cap: float,
    causal: tuple[str, ...],
    window: int,
    given: tuple[str, ...],
) -> Array:
    """Return the values, averaged by the softmax of what each query sees of its scores."""
    further = dict(zip(given, more, strict=True))
    scores = product(query, key, (over,)).map(lambda d: d * scale)
    if cap:
        scores = scores.map(lambda d: cap * np.tanh(d / cap))
    if "bias" in further:
        bias = further["bias"].to(scores.axes)
        scores = scores.map(lambda d: d + bias)
    for axis in causal:
        places = (_places(scores, axis), _places(scores, along))
        scores = _masked(scores, seen_from(*places, window))
    if "keep" in further:
        scores = _masked(scores, further["keep"])
    if "query_segments" in further:
        scores = _masked(scores, in_segment(further["query_segments"], further["key_segments"]))
    weights = scores.map(lambda d: _weights(d, scores.axes.index(along), _sink(further, scores)))
    return product(weights, value, (along,))


def _places(scores: Array, axis: str) -> Array:
    return Array(np.arange(scores.size(axis)), (axis,))


def _masked(scores: Array, seen: Array) -> Array:
    return scores.map(lambda d: np.where(seen.to(scores.axes), d, -np.inf))


def _sink(given: dict[str, Array], scores: Array) -> Data:
    """Return the score that no value belongs to; −∞ is none."""
    return given["sinks"].to(scores.axes) if "sinks" in given else np.array(-np.inf)


def _weights(scores: Data, axis: int, sink: Data) -> Data:
    """Return the softmax along `axis` of the scores and one more, less the one; zeros if all −∞."""
    top = np.maximum(scores.max(axis, keepdims=True), sink)
    top = np.where(top == -np.inf, 0, top)
    parts = np.exp(scores - top)
    total = parts.sum(axis, keepdims=True) + np.exp(sink - top)
    return np.asarray(parts / np.where(total == 0, 1, total))
