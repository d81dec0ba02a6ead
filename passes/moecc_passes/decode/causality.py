"""Whether a token depends on itself and those before it alone, and what is in the way if not.

Only then is what a token leaves behind (its keys and values) the same whatever follows it.  Scores
must have −∞ where a causal mask hides a key, so that their softmax has zeros there; a product over
the keys then reads nothing of what is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from moecc.errors import Problem
from moecc.ir.graph import Node, Value
from moecc.ir.verify import where
from moecc.rewrite import P, fits
from moecc_passes.decode.sides import DECODER_TOKENS, Kind, Sides

CAUSAL = P.causal(P.any("query"), P.any("key"), window=P.attr("window"))
MASK = P.mask(P.any("x"), P.any("keep"), fill=float("-inf"))
LARGEST = P.logsumexp(P.any()) | P.max(P.any())
"""Reductions to which −∞ adds nothing."""

CAST = P.cast(P.any())
ROPE = P.rope(P.any())


class Hidden(Enum):
    """What a value has in the place of keys that a token must not see; false counts as 0."""

    NOTHING = "whatever they are"
    INFINITE = "−∞"
    ZERO = "0"


def problems(sides: Sides) -> Iterator[Problem]:
    """Yield why the tokens of a graph cannot be made one by one."""
    yield from _input_problems(sides)
    hidden: dict[Value, Hidden] = {}
    for node in sides.graph:
        if sides.kinds[node.results[0]] < Kind.PLACE:
            continue
        hidden.update(dict.fromkeys(node.results, _hidden(sides, node, hidden)))
        problem = _problem(sides, node, hidden)
        if problem is not None:
            yield problem


def _input_problems(sides: Sides) -> Iterator[Problem]:
    for name, value in sides.graph.inputs.items():
        if value is sides.tokens:
            continue
        place = f"input {name}"
        if value.type.dtype.kind == "key":
            hint = "specialize{mode=eval} makes a graph without noise"
            yield Problem("the graph draws random numbers", place, hint=hint)
        elif sides.tokens.type.axes[-1] in value.type.axes or sides.tokens.name != DECODER_TOKENS:
            what = f"another input beside {sides.tokens.name} is for tokens that are continued"
            yield Problem(what, place, expected=str(sides.tokens), found=str(value.type))


def _hidden(sides: Sides, node: Node, hidden: dict[Value, Hidden]) -> Hidden:
    """Return what the results of `node` have where a key is hidden."""
    found = fits(MASK, node)
    if found is not None and _is_causal(sides, found.value("keep")):
        return Hidden.INFINITE
    if _is_causal(sides, node.results[0]):
        return Hidden.ZERO
    states = [hidden.get(v, Hidden.NOTHING) for v in node.operands]
    if node.op.is_distribution and Hidden.INFINITE in states:
        return Hidden.ZERO
    if Hidden.ZERO in states and (node.op.is_scaling or _keeps_zero(node)):
        return Hidden.ZERO
    is_kept = node.op.carries or found is not None or node.op.is_sum
    return Hidden.INFINITE if Hidden.INFINITE in states and is_kept else Hidden.NOTHING


def _keeps_zero(node: Node) -> bool:
    is_linear = len(node.operands) == 1 and node.op.linear == (0,) and not node.mixes
    return is_linear or fits(CAST, node) is not None


def _is_causal(sides: Sides, keep: Value) -> bool:
    """Whether `keep` hides the keys after each query."""
    found = fits(CAUSAL, keep.node)
    return (
        found is not None
        and sides.is_positions(found.value("query"))
        and sides.is_key_positions(found.value("key"))
    )


def _problem(sides: Sides, node: Node, hidden: dict[Value, Hidden]) -> Problem | None:
    keys = [v for v in node.operands if sides.keys.get(v, frozenset()) & set(node.mixes)]
    states = {hidden.get(v, Hidden.NOTHING) for v in keys}
    if keys and not _reads_no_hidden(node, states):
        return Problem(
            "this attention is not causal: a token would depend on those after it", where(node),
            expected="scores that a causal mask hides before their softmax",
            hint="only a decoder continues a text token by token",
        )  # fmt: skip
    if any(sides.is_query(v) for v in node.operands) and _mixes_tokens(sides, node):
        return Problem(
            "tokens meet otherwise than by a causal attention", where(node),
            hint="moecc run takes the whole text at once",
        )  # fmt: skip
    strange = [
        v for _, v in sides.met(node)
        if sides.kinds[v] is Kind.PLACE and not sides.is_key_positions(v)
    ]  # fmt: skip
    if strange:
        return Problem(
            f"%{strange[0].name} is made of the positions of all tokens", where(node),
            expected="positions renamed, or what is made of tokens",
        )  # fmt: skip
    return None


def _reads_no_hidden(node: Node, states: set[Hidden]) -> bool:
    """Whether the result of a node that mixes keys depends on no hidden one."""
    if node.op.is_product:
        return Hidden.ZERO in states
    return states == {Hidden.INFINITE} and (
        node.op.is_distribution or fits(LARGEST, node) is not None
    )


def _mixes_tokens(sides: Sides, node: Node) -> bool:
    """Whether elements of several tokens meet in `node`, or its results lose track of them."""
    if node.op.moves is not None or (node.op.assigns_slots and not node.op.chooses):
        return False
    if sides.is_positions(node.results[0]) or fits(ROPE, node) is not None:
        return False
    renamed = any(sides.keys.get(v) for v in node.results)
    lost = not any(sides.is_query(v) for v in node.results) and not renamed
    return sides.axis in node.mixes or lost
