"""Rotary and relative positions, causal masks, and attention as one operation.

The scalings of rotary frequencies are those that checkpoints of Hugging Face transformers are
trained with: linear (kaiokendev), dynamic NTK (bloc97, emozilla), llama3 (Llama 3.1), YaRN
(Peng et al. 2023) and LongRoPE (Ding et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import inf, isfinite
from typing import Literal, get_args

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data
from moecc.ir.operand import Attrs, Operand
from moecc.ir.operation import (
    AxisName,
    AxisNames,
    Bool,
    Float,
    Int,
    Numbers,
    Op,
    Word,
    Words,
    operation,
)
from moecc.ir.ops.contraction import AlongAxisOp, contract_type, product
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    need_float,
    need_kind,
    need_order,
    no_duplicates,
    no_ragged,
    same_dtype,
    same_size,
    widest,
)
from moecc.ir.traits import Residual
from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head
from moecc.types import F32, I32, PRED, Axis, TensorType

ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LENGTH_SCALINGS = ("dynamic", "longrope")
"""Those whose frequencies depend on the length of the sequence."""


@operation("rope", "positions", results=("cos", "sin"), sharding=by_name)
class RopeOp(Op):
    """Tables of cosines and sines for rotary positions, both halves alike (Su et al. 2021)."""

    axis = AxisName("the new axis")
    size = Int("its size, the head dimension", shrinks=True)
    theta = Float("the base of the frequencies", 10000.0)
    scaling = Word("how the frequencies are scaled", "default", choices=ROPE_SCALINGS)
    factor = Float("the scaling factor", 1.0)
    original_context = Int("the context length before scaling", 0)
    low_freq_factor = Float("llama3", 1.0)
    high_freq_factor = Float("llama3", 4.0)
    beta_fast = Float("yarn", 32.0)
    beta_slow = Float("yarn", 1.0)
    truncate = Bool("yarn: whether its bounds are rounded to integers", True)
    attention_factor = Float("what both tables are multiplied by", 1.0)
    short_factors = Numbers("longrope: divisors up to original_context", ())
    long_factors = Numbers("longrope: divisors for longer sequences", ())

    def infer(self, positions: Operand) -> tuple[TensorType, ...]:
        need_kind(positions.type, "int", "the positions")
        if self.size <= 0 or self.size % 2:
            raise InputError("rotary tables have an even number of entries", found=str(self.size))
        for rule, holds in self._scaling_rules():
            if not holds:
                raise InputError(f"rope scaling {self.scaling} is not defined", expected=rule)
        axes = no_duplicates((*positions.type.axes, Axis(self.axis, self.size)))
        return (TensorType(F32, axes), TensorType(F32, axes))

    def _scaling_rules(self) -> Iterator[tuple[str, bool]]:
        """Yield the conditions on the attributes, and whether each holds."""
        kind = self.scaling
        least = 1 if kind == "yarn" else 0
        yield f"theta above {least}", least < self.theta < inf
        yield "a positive factor", 0 < self.factor < inf
        yield "a finite attention_factor", isfinite(self.attention_factor)
        if kind in ("dynamic", "llama3", "yarn", "longrope"):
            yield "original_context of at least 1", self.original_context >= 1
        if kind == "dynamic":
            yield "more than two entries, for the exponent size / (size − 2)", self.size > 2
        if kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            yield "low_freq_factor not above high_freq_factor", 0 < low <= high < inf
        if kind == "yarn":
            slow, fast = self.beta_slow, self.beta_fast
            yield "beta_slow not above beta_fast", 0 < slow <= fast < inf
        count = self.size // 2 if kind == "longrope" else 0
        for name in ("short_factors", "long_factors"):
            divisors = self.attrs[name]
            is_valid = len(divisors) == count and min(divisors, default=1) > 0
            yield f"{count} positive {name}", is_valid

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        # Some scalings read the largest position of all.
        return operands[0].type.names if self.scaling in LENGTH_SCALINGS else ()

    def meaning(self, positions: Array) -> tuple[Array, Array]:
        """Return cosines and sines of position times frequency; the second half repeats."""
        length = int(positions.data.max(initial=0)) + 1
        half = positions.data[..., None] * self.frequencies(length)
        angles = np.concatenate([half, half], -1)
        axes, factor = (*positions.axes, self.axis), self.attention_factor
        return Array(np.cos(angles) * factor, axes), Array(np.sin(angles) * factor, axes)

    def term(self, algebra: Algebra, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return uninterpreted functions of the position, and of the greatest where it matters."""
        new = algebra.axis(self.axis, self.size)
        attrs = self.written("axis")
        longest = [positions.closed()] if self.scaling in LENGTH_SCALINGS else []
        arguments = [positions.body, algebra.index(new)]
        cos, sin = (
            Tensor(
                algebra,
                (*positions.axes, new),
                algebra.apply(Head(f"rope_{name}", attrs), longest, arguments),
            )
            for name in ("cos", "sin")
        )
        return cos, sin

    def frequencies(self, length: int) -> Data:
        """Return the angle per position of each pair of entries, ``[size / 2]``.

        Args:
          length: the number of positions, on which dynamic scaling and longrope depend.
        """
        kind, factor, size, theta = self.scaling, self.factor, self.size, self.theta
        if kind == "dynamic":
            context = self.original_context
            grown = factor * max(length, context) / context - (factor - 1)
            theta *= float(grown ** (size / (size - 2)))
        plain = np.asarray(theta ** -(np.arange(0, size, 2) / size))
        if kind == "linear":
            return np.asarray(plain / factor)
        if kind == "llama3":
            # Slow frequencies are divided by the factor, fast ones kept, others interpolated.
            low, high = self.low_freq_factor, self.high_freq_factor
            turns = self.original_context * plain / (2 * math.pi)
            # Llama 4 Scout has one factor for both, and so nothing between.
            keep = np.clip((turns - low) / (high - low), 0, 1) if low < high else turns > low
            return np.asarray(plain / factor * (1 - keep) + plain * keep)
        if kind == "longrope":
            is_long = length > self.original_context
            return np.asarray(
                plain / np.asarray(self.long_factors if is_long else self.short_factors)
            )
        if kind == "yarn":
            keep = 1 - self._yarn_ramp()
            return np.asarray(plain / factor * (1 - keep) + plain * keep)
        return plain

    def _yarn_ramp(self) -> Data:
        """Return 0 where a frequency is kept, 1 where it is divided, and a ramp between."""
        first, last = self._yarn_entry(self.beta_fast), self._yarn_entry(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.size - 1)
        width = last - first if last != first else 0.001
        return np.asarray(np.clip((np.arange(self.size // 2) - first) / width, 0, 1))

    def _yarn_entry(self, turns: float) -> float:
        """Return the entry, as a real number, with `turns` rotations in the original context."""
        wavelength = self.original_context / (turns * 2 * math.pi)
        return self.size * math.log(wavelength) / (2 * math.log(self.theta))


@operation("rotate", "x cos sin", linear=(0,), residual=Residual((1, 2), of=(0,)), sharding=by_name)
class RotateOp(AlongAxisOp):
    """x · cos + rotate_half(x) · sin along an axis; the halves are paired, as in GPT-NeoX."""

    def infer(self, x: Operand, cos: Operand, sin: Operand) -> TensorType:
        types = (x.type, cos.type, sin.type)
        for type in types:
            need_float(type)
        size = axis_of(x.type, self.axis).size
        no_ragged(x.type, (self.axis,), "cannot rotate")
        if not isinstance(size, int) or size % 2:
            raise InputError("only an even number of entries is rotated", found=str(x.type))
        is_within = widest(types).names == x.type.names
        if not is_within or self.axis not in cos.type or self.axis not in sin.type:
            raise InputError(
                "the tables must lie within the rotated value and have its axis",
                expected=f"axes of {x.type}",
                found=f"{cos.type} and {sin.type}",
            )
        return x.type

    def meaning(self, x: Array, cos: Array, sin: Array) -> Array:
        at = x.axes.index(self.axis)
        first, second = np.split(x.data, 2, at)
        turned = np.concatenate([-second, first], at)
        return x.map(lambda d: d * cos.to(x.axes) + turned * sin.to(x.axes))

    def term(self, algebra: Algebra, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        functions = [t.along(self.axis) for t in (x, cos, sin)]
        index = algebra.index(x.axis(self.axis))
        return x.with_body(algebra.apply(Head("rotate"), functions, [index]))


# Which keys a query sees, and how far they are: axes of one name are matched, others crossed.


def _crossed_types(query: Operand, key: Operand, noun: str) -> tuple[Axis, ...]:
    """Return the axes of queries and keys; those of one name are matched, others crossed."""
    need_kind(query.type, "int", f"the {noun} of the queries")
    need_kind(key.type, "int", f"the {noun} of the keys")
    for axis in key.type.axes:
        if axis.name in query.type:
            same_size(query.type[axis.name], axis)
    return (*query.type.axes, *(a for a in key.type.axes if a.name not in query.type))


def _crossed(query: Array, key: Array) -> tuple[tuple[str, ...], Data, Data]:
    """Return the axes of queries and keys, each once, and the data of both."""
    axes = (*query.axes, *(a for a in key.axes if a not in query.axes))
    return axes, query.to(axes), key.to(axes)


def _visible(query: Array, key: Array, window: int) -> Array:
    """Return which keys a query sees, by their positions."""
    axes, queries, keys = _crossed(query, key)
    behind = queries - keys
    return Array(np.asarray((behind >= 0) & ((behind < window) | (not window))), axes)


def _visible_term(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Return [query − key ≥ 0], and with a window [window − 1 − (query − key) ≥ 0], too."""
    algebra = query.algebra
    behind = algebra.subtract(query.body, key.body)
    body = algebra.apply(Head("at_least_0"), (), [behind])
    if window:
        left = algebra.subtract(algebra.number(window - 1), behind)
        body = algebra.multiply(body, algebra.apply(Head("at_least_0"), (), [left]))
    return Tensor(algebra, terms.crossed(query, key), body)


def _same_segment_term(query: Tensor, key: Tensor) -> Tensor:
    algebra, axes = query.algebra, terms.crossed(query, key)
    arguments = [query.body, key.body]
    return Tensor(algebra, axes, algebra.apply(Head("holds", ("same_segment",)), (), arguments))


def _same_segment(query: Array, key: Array) -> Array:
    """Return which keys a query sees, by their segments."""
    axes, queries, keys = _crossed(query, key)
    return Array(np.asarray((queries == keys) | (queries == 0)), axes)


@operation("causal", "query key", sharding=by_name)
class CausalOp(Op):
    """Whether a query may see a key: key ≤ query, and query − key < window if there is one.

    Axes of one name are matched, others crossed: each text of a batch may have positions of
    its own.
    """

    window = Int("the sliding window in tokens; 0: none", 0)

    def infer(self, query: Operand, key: Operand) -> TensorType:
        return TensorType(PRED, _crossed_types(query, key, "positions"))

    def meaning(self, query: Array, key: Array) -> Array:
        return _visible(query, key, self.window)

    def term(self, algebra: Algebra, query: Tensor, key: Tensor) -> Tensor:
        return _visible_term(query, key, self.window)


@operation("same_segment", "query key", sharding=by_name)
class SameSegmentOp(Op):
    """Whether a query may see a key: both are of one segment, or the query is padding.

    A segment is a document of several that are packed into a sequence; padding is segment 0.
    What padding sees is of no use, but a query that sees nothing would have no weights.  Axes
    of one name are matched, others crossed.
    """

    def infer(self, query: Operand, key: Operand) -> TensorType:
        return TensorType(PRED, _crossed_types(query, key, "segments"))

    def meaning(self, query: Array, key: Array) -> Array:
        return _same_segment(query, key)

    def term(self, algebra: Algebra, query: Tensor, key: Tensor) -> Tensor:
        return _same_segment_term(query, key)


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
    starts, geometric = list(range(1, exact + 1)), count - exact
    for step in range(1, geometric):
        distance = starts[-1]
        while distance**geometric < furthest**step * exact ** (geometric - step):
            distance += 1
        starts.append(distance)
    return tuple(starts)


MOST_DISTANCE = 1 << 16


def _need_distance(distance: int, least: int, choices: str = "") -> None:
    if not least < distance <= MOST_DISTANCE:
        raise InputError(
            "max_distance is out of range for the buckets",
            expected=f"{choices}more than {least}, at most {MOST_DISTANCE}",
            found=str(distance),
        )


@operation("relative_buckets", "query key", sharding=by_name)
class RelativeBucketsOp(Op):
    """The bucket of each distance from query to key, nearby ones exact, far ones geometric.

    Without `bidirectional`, keys behind the query have buckets by their distance and all keys
    ahead share bucket 0.  With it, keys ahead have the second half of the buckets.  T5 looks
    up its attention bias by them (Raffel et al. 2020).  Axes are matched and crossed as by
    `causal`.
    """

    bidirectional = Bool("whether keys ahead have buckets of their own")
    buckets = Int("the number of buckets, of both directions together", 32)
    max_distance = Int("the distance from which on all share one bucket", 128)

    def infer(self, query: Operand, key: Operand) -> TensorType:
        axes = _crossed_types(query, key, "positions")
        directions = 2 if self.bidirectional else 1
        if self.buckets % directions or self.buckets // directions < 2:
            raise InputError(
                "too few buckets, or an odd number",
                expected="at least 2, or with both directions an even number of at least 4",
                found=str(self.buckets),
            )
        _need_distance(self.max_distance, self.buckets // directions // 2)
        return TensorType(I32, axes)

    def meaning(self, query: Array, key: Array) -> Array:
        axes, queries, keys = _crossed(query, key)
        ahead = keys - queries
        if not self.bidirectional:
            return Array(self._bucket(np.maximum(-ahead, 0), self.buckets), axes)
        half = self.buckets // 2
        near = self._bucket(np.abs(ahead), half)
        return Array(np.where(ahead > 0, half + near, near), axes)

    def term(self, algebra: Algebra, query: Tensor, key: Tensor) -> Tensor:
        """Return an uninterpreted function of the distance."""
        attrs = ("bucket", self.bidirectional, self.buckets, self.max_distance)
        distance = algebra.subtract(key.body, query.body)
        body = algebra.apply(Head("integer", attrs), (), [distance])
        return Tensor(algebra, terms.crossed(query, key), body)

    def _bucket(self, distance: Data, count: int) -> Data:
        """Return the bucket of each distance, of `count` buckets, half of them exact."""
        exact = count // 2
        growth = np.log(np.maximum(distance, 1) / exact) / math.log(self.max_distance / exact)
        # Rounding of logarithms must not decide where the quotient is an integer.
        far = exact + np.floor(growth * (count - exact) + 1e-9).astype(int)
        return np.where(distance < exact, distance, np.minimum(far, count - 1))


def signed_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return for each number of buckets from the middle, from 1 on, the smallest distance with it.

    With h of 2 · h buckets on either side, h // 2 =: e of them hold one distance each, and bucket
    e + m those above e · ((max_distance − 1) / e)^((m − 1) / (e − 1)), up to the same of m + 1
    (DeBERTa-v2, He et al. 2021, and its code).  With a `max_distance` of 0 each holds one.  Powers
    of whole numbers are compared, not logarithms, so no rounding decides.
    """
    half = buckets // 2
    if not max_distance:
        return tuple(range(1, half + 1))
    exact = half // 2
    starts, distance = list(range(1, exact + 1)), exact + 1
    for step in range(half - exact):
        bound = (max_distance - 1) ** step * exact ** (exact - 1)
        while distance ** (exact - 1) * exact**step <= bound:
            distance += 1
        starts.append(distance)
    return tuple(starts)


@operation("signed_buckets", "query key", sharding=by_name)
class SignedBucketsOp(Op):
    """The bucket of each distance, from keys far ahead of the query to keys far behind it.

    The middle one is that of the query's own place; those near it hold one distance each, far
    ones more and more.  DeBERTa looks up keys and queries of distances by them (He et al. 2021).
    Axes are matched and crossed as by `causal`.
    """

    buckets = Int("the number of buckets, of both directions together")
    max_distance = Int("the distance from which on all share one bucket; 0: each has its own", 0)

    def infer(self, query: Operand, key: Operand) -> TensorType:
        axes = _crossed_types(query, key, "positions")
        least = 8 if self.max_distance else 2
        if self.buckets % 2 or self.buckets < least:
            expected = f"an even number of at least {least}"
            raise InputError("no such buckets", expected=expected, found=str(self.buckets))
        if self.max_distance:
            _need_distance(self.max_distance, self.buckets // 4 + 1, "0, or ")
        return TensorType(I32, axes)

    def meaning(self, query: Array, key: Array) -> Array:
        axes, queries, keys = _crossed(query, key)
        behind, half = queries - keys, self.buckets // 2
        starts = signed_starts(self.buckets, self.max_distance)
        near = np.sign(behind) * np.searchsorted(starts, np.abs(behind), side="right")
        return Array(np.asarray(np.clip(half + near, 0, self.buckets - 1)), axes)

    def term(self, algebra: Algebra, query: Tensor, key: Tensor) -> Tensor:
        """Return an uninterpreted function of the distance."""
        attrs = ("signed", self.buckets, self.max_distance)
        distance = algebra.subtract(key.body, query.body)
        body = algebra.apply(Head("integer", attrs), (), [distance])
        return Tensor(algebra, terms.crossed(query, key), body)


def alibi_slopes(heads: int) -> Data:
    """Return the factor of each head on distances, from 2^(−8 / heads) to 2^−8.

    Of a number of heads that is no power of two, the first have every second slope of the next
    power of two, beginning with the second, and the others those in between, as in the code of
    Press et al. (2022).
    """
    power = 1 << (heads - 1).bit_length()
    exponents = np.arange(1, power + 1) * (8 / power)
    if power != heads:
        exponents = np.concatenate([exponents[1::2], exponents[::2]])[:heads]
    return np.asarray(2.0**-exponents)


@operation("alibi", "query key", sharding=by_name)
class AlibiOp(Op):
    """Distances from query to key times a slope for each head, a bias of scores.

    Keys behind the query have a negative bias (ALiBi, Press et al. 2022).  Axes are matched and
    crossed as by `causal`.
    """

    axis = AxisName("the new axis, of the heads")
    size = Int("its size, which the slopes depend on")

    def infer(self, query: Operand, key: Operand) -> TensorType:
        if self.size < 1:
            raise InputError("no heads", expected="a size of at least 1", found=str(self.size))
        axes = (*_crossed_types(query, key, "positions"), Axis(self.axis, self.size))
        return TensorType(F32, no_duplicates(axes))

    def meaning(self, query: Array, key: Array) -> Array:
        axes, queries, keys = _crossed(query, key)
        distances = (keys - queries)[..., None]
        return Array(np.asarray(distances * alibi_slopes(self.size)), (*axes, self.axis))

    def term(self, algebra: Algebra, query: Tensor, key: Tensor) -> Tensor:
        """Return an uninterpreted function of the distance and the head."""
        new = algebra.axis(self.axis, self.size)
        arguments = [algebra.subtract(key.body, query.body), algebra.index(new)]
        body = algebra.apply(Head("alibi", (self.size,)), (), arguments)
        return Tensor(algebra, (*terms.crossed(query, key), new), body)


Given = Literal["bias", "sinks", "keep", "query_segments", "key_segments"]
"""Further operands of ``attention``, by the words of its attribute ``given``."""

_SEGMENTS = ("query_segments", "key_segments")


@operation(
    "attention",
    "query key value",
    results=("mixed",),
    linear=(2,),
    variadic=True,
    attends=True,
    residual=Residual((0, 1, 2)),
    sharding=by_name,
)
class AttentionOp(Op):
    """Values averaged by the softmax of query · key, without scores in memory.

    Scores are the sum over `over` of query · key, times `scale`, then cap · tanh(scores / cap)
    if there is a cap, then with `bias` added.  A query sees a key along `along` if `causal` is
    empty or the index of the key is at most its own along that axis, and with a window above
    its own less the window; if `keep` holds; and if both are of one segment, or the query's is
    0 (padding).  The softmax along `along` is over what is seen, and over the `sinks`, scores
    that no value belongs to.  Where nothing is seen the result is 0.

    Further operands have words in `given`, in their order.  Each has axes of the scores;
    `sinks` and `query_segments` without `along`.
    """

    over = AxisName("the axis of queries and keys that is summed over")
    along = AxisName("the axis of keys and values that the softmax runs along")
    scale = Float("the factor on the products", 1.0)
    cap = Float("the soft cap of the scores; 0: none", 0.0)
    causal = AxisNames("the axis of queries that see no later keys; (): all", ())
    window = Int("how many keys a query sees, itself included; 0: all", 0)
    given = Words("the further operands", (), choices=get_args(Given))

    def infer(self, *operands: Operand) -> TensorType:
        self._check_numbers()
        query, key, value = (v.type for v in operands[:3])
        need_order(operands, query, key, self.along, " and values")
        scores = contract_type(query, key, (self.over,))
        same_dtype((query, value))
        for axis in self.causal:
            axis_of(scores, axis, "the scores")
            if axis == self.along:
                message = "causal names the axis of the queries"
                raise InputError(message, expected=str(scores), found=axis)
        if len(self.given) != len(operands) - 3:
            words = ", ".join(self.given)
            raise InputError(
                "each operand after the values has its word in given",
                expected=f"{len(self.given)} more: {words}" if words else "no more operands",
                found=", ".join(f"%{v.name}" for v in operands[3:]) or "none",
            )
        further = zip(self.given, (v.type for v in operands[3:]), strict=True)
        self._check_further(dict(further), scores)
        return contract_type(scores, value, (self.along,))

    def _check_numbers(self) -> None:
        if not isfinite(self.scale):
            raise InputError("scale must be a finite number", found=str(self.scale))
        if not 0 <= self.cap < inf:
            raise InputError(
                "cap must be a finite number, 0 for none, or above", found=f"{self.cap}"
            )
        if len(self.causal) > 1:
            raise InputError(
                "queries are in order along one axis",
                expected="at most one axis in causal",
                found=", ".join(self.causal),
            )
        if self.window < 0 or (self.window and not self.causal):
            raise InputError(
                "a window is that of a causal attention",
                expected="window=0, or above with causal",
                found=f"window={self.window}, causal={', '.join(self.causal) or '()'}",
            )

    def _check_further(self, further: dict[str, TensorType], scores: TensorType) -> None:
        by_query = scores.without(self.along)
        if "bias" in further:
            same_dtype((scores, further["bias"]))
            widest((scores, further["bias"]))
        if "sinks" in further:
            need_float(further["sinks"], "the sinks")
            same_dtype((scores, further["sinks"]))
            _check_within(further["sinks"], by_query, "the sinks")
        if "keep" in further:
            need_kind(further["keep"], "bool", "what is kept")
            _check_within(further["keep"], scores, "what is kept")
        segments = further.keys() & set(_SEGMENTS)
        if len(segments) == 1:
            raise InputError(
                "segments are those of queries and of keys",
                expected=", ".join(_SEGMENTS),
                found=", ".join(segments),
            )
        if segments:
            for word, within in zip(_SEGMENTS, (by_query, scores), strict=True):
                need_kind(further[word], "int", word)
                _check_within(further[word], within, word)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (self.over, self.along, *self.causal)

    def meaning(self, query: Array, key: Array, value: Array, *arrays: Array) -> Array:
        """Return the values, averaged by the softmax of what each query sees of its scores."""
        further = dict(zip(self.given, arrays, strict=True))
        result = product(query, key, (self.over,))
        axes, scores = result.axes, result.data * self.scale
        if self.cap:
            scores = self.cap * np.tanh(scores / self.cap)
        if "bias" in further:
            scores = scores + further["bias"].to(axes)
        masks = [further["keep"]] if "keep" in further else []
        for axis in self.causal:
            queries, keys = (Array(np.arange(result.size(a)), (a,)) for a in (axis, self.along))
            masks.append(_visible(queries, keys, self.window))
        if "query_segments" in further:
            masks.append(_same_segment(*(further[word] for word in _SEGMENTS)))
        for mask in masks:
            scores = np.where(mask.to(axes), scores, -np.inf)
        # The score that no value belongs to; −∞ is none.
        sink = further["sinks"].to(axes) if "sinks" in further else np.array(-np.inf)
        weights = _softmax_with_sink(scores, axes.index(self.along), sink)
        return product(Array(weights, axes), value, (self.along,))

    def term(
        self, algebra: Algebra, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
    ) -> Tensor:
        """Return the values, averaged by the softmax of what each query sees of its scores."""
        further = dict(zip(self.given, tensors, strict=True))
        scores = terms.scaled(terms.contracted(query, key, (self.over,)), self.scale)
        if self.cap:
            inner = terms.scaled(scores, Fraction(1) / Fraction(self.cap))
            scores = terms.scaled(terms.pointwise("tanh", (), (inner,)), self.cap)
        if "bias" in further:
            scores = replace(terms.summed(scores, further["bias"]), axes=scores.axes)
        masks = [further["keep"]] if "keep" in further else []
        for axis in self.causal:
            queries, keys = (
                Tensor(algebra, (v,), algebra.index(v))
                for v in (scores.axis(axis), scores.axis(self.along))
            )
            masks.append(_visible_term(queries, keys, self.window))
        if "query_segments" in further:
            masks.append(_same_segment_term(*(further[word] for word in _SEGMENTS)))
        for mask in masks:
            hidden = terms.pointwise("mask", (-inf,), (scores, mask))
            scores = replace(hidden, axes=scores.axes, finite=False)
        weights = terms.softmax(scores, self.along, further.get("sinks"))
        return terms.contracted(weights, value, (self.along,))


def _softmax_with_sink(scores: Data, axis: int, sink: Data) -> Data:
    """Return the softmax along `axis` of the scores and one more, less the one; zeros if all −∞."""
    top = np.maximum(scores.max(axis, keepdims=True), sink)
    top = np.where(top == -np.inf, 0, top)
    parts = np.exp(scores - top)
    total = parts.sum(axis, keepdims=True) + np.exp(sink - top)
    return np.asarray(parts / np.where(total == 0, 1, total))


def _check_within(type: TensorType, scores: TensorType, noun: str) -> None:
    for axis in type.axes:
        if axis.name not in scores:
            raise InputError(
                f"{noun} must have axes of the scores", expected=str(scores), found=str(type)
            )
    widest((scores, type))
