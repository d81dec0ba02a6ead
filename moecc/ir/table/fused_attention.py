"""Attention as one operation, whose scores need never be stored."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

from moecc.errors import InputError
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.contraction import contract_type
from moecc.ir.table.rules import axis_of, need_float, need_kind, same_dtype, widest
from moecc.ir.table.sharding import by_name
from moecc.ir.traits import Residual
from moecc.types.tensor import TensorType

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
