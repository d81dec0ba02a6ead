"""What the values of a graph depend on, and on which side of an attention they are.

A decoder has tokens along one axis.  Queries have that axis.  Keys and values have it under another
name, since an attention meets its sequence twice; the renaming is where the two sides part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from moecc.ir.graph import Graph, Node, Value
from moecc.rewrite import P, fits

TOKENS, DECODER_TOKENS = "tokens", "decoder_tokens"

POSITIONS = P.positions(P.any("like"), axis=P.attr("axis"))
RENAME = P.rename(P.any("x"), axis=P.attr("axis"), to=P.attr("to"))


class Kind(IntEnum):
    """What a value depends on at most, in the order in which one outweighs another."""

    FIXED = 0
    """Parameters and constants."""
    ENCODED = 1
    """Inputs besides the tokens that are continued: those of an encoder."""
    PLACE = 2
    """The number of the tokens alone: their positions."""
    DATA = 3
    """The tokens."""


@dataclass
class Sides:
    """What is known of the values of a graph.

    Attributes:
      graph: the graph.
      tokens: the input that is continued, ``[batch, seq]``.
      axis: the axis along which it is.
      kinds: what each value depends on.
      keys: the axes of each value along which it has tokens as keys.
    """

    graph: Graph
    tokens: Value
    axis: str
    kinds: dict[Value, Kind] = field(default_factory=dict)
    keys: dict[Value, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, tokens: Value) -> Sides:
        """Classify all values of `graph`."""
        sides = cls(graph, tokens, tokens.type.names[-1])
        sides.kinds.update(dict.fromkeys(graph.params.values(), Kind.FIXED))
        sides.kinds.update(dict.fromkeys(graph.inputs.values(), Kind.ENCODED))
        sides.kinds[tokens] = Kind.DATA
        for node in graph:
            kind, keys = sides._kind(node), sides._keys(node)
            for value in node.results:
                sides.kinds[value] = kind
                sides.keys[value] = keys & set(value.type.names)
        return sides

    def is_query(self, value: Value) -> bool:
        """Whether `value` has an element for each token, by the name that the tokens have."""
        return self.kinds[value] >= Kind.PLACE and self.axis in value.type

    def is_key(self, value: Value) -> bool:
        """Whether `value` has tokens as keys, and not as queries."""
        return bool(self.keys.get(value)) and not self.is_query(value)

    def met(self, node: Node) -> Iterator[tuple[int, Value]]:
        """Yield the operands of `node` that are keys and meet queries there, or one another."""
        keys = [(i, v) for i, v in enumerate(node.operands) if self.is_key(v)]
        queries = any(map(self.is_query, (*node.operands, *node.results)))
        for number, value in keys:
            if queries or self.keys[value] & set(node.mixes):
                yield number, value

    def encoded(self, node: Node) -> Iterator[tuple[int, Value]]:
        """Yield the operands of `node` that an encoder makes, if tokens come to it here."""
        if all(self.kinds[v] < Kind.PLACE for v in node.results):
            return
        for number, value in enumerate(node.operands):
            if self.kinds[value] is Kind.ENCODED:
                yield number, value

    def is_positions(self, value: Value) -> bool:
        """Whether `value` is 0, 1, 2 … for the tokens."""
        found = fits(POSITIONS, value.node)
        return found is not None and self.is_query(found.value("like")) and value.type.names == (
            self.axis,
        )  # fmt: skip

    def is_key_positions(self, value: Value) -> bool:
        """Whether `value` is 0, 1, 2 … for the tokens as keys."""
        found = fits(RENAME, value.node)
        return found is not None and self.is_positions(found.value("x"))

    def _kind(self, node: Node) -> Kind:
        kind = max((self.kinds[v] for v in node.operands), default=Kind.FIXED)
        found = fits(POSITIONS, node)
        if found is None or kind < Kind.PLACE:
            return kind
        return Kind.PLACE if found.attr("axis") in (self.axis, *self._of(node)) else Kind.FIXED

    def _keys(self, node: Node) -> frozenset[str]:
        keys = self._of(node)
        found = fits(RENAME, node)
        if found is None:
            return keys
        old, new = found.attr("axis"), found.attr("to")
        is_token = old in keys or (old == self.axis and self.is_query(found.value("x")))
        return (keys - {old}) | {new} if is_token else keys

    def _of(self, node: Node) -> frozenset[str]:
        return frozenset().union(*(self.keys.get(v, frozenset()) for v in node.operands))


def continued(graph: Graph) -> Value | None:
    """Return the input whose tokens are continued: the decoder's, if there are two, or None.

    Tokens are integers ``[batch, seq]``.
    """
    name = DECODER_TOKENS if DECODER_TOKENS in graph.inputs else TOKENS
    tokens = graph.inputs.get(name)
    is_tokens = tokens is not None and tokens.type.dtype.kind == "int" and len(tokens.type) == 2
    return tokens if is_tokens else None
