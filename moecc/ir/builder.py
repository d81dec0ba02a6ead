"""A builder: operations as methods that use the current location and origin.

b = Builder(graph, loc="layers.0.ffn")
hidden = b.mul(b.silu(b.contract(x, gate, over="embed")), b.contract(x, up, over="embed"))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.operation import op as find_op
from moecc.ir.operations import Operations


class Builder(Operations):
    """Appends nodes to a graph, or inserts them before a node.

    Every operation of the table is a method (`moecc.ir.operations`); it takes the operands, then
    the attributes by name, and ``name=`` for the result.  It returns the result, or a tuple where
    there are several.  An attribute of kind ``axes`` or ``words`` may be given as one name.

    Attributes:
      graph: the graph that nodes are added to.
      loc: the location of new nodes.
      origin: the pass and rewrite recorded as the origin of new nodes.
      before: the node to insert in front of; None appends.
    """

    def __init__(
        self, graph: Graph, *, loc: str = "", origin: str = "", before: Node | None = None
    ) -> None:
        self.graph = graph
        self.loc = loc
        self.origin = origin
        self.before = before

    @contextmanager
    def at(self, loc: str) -> Iterator[Builder]:
        """Use another location within the context."""
        old, self.loc = self.loc, loc
        try:
            yield self
        finally:
            self.loc = old

    def node(
        self, op: str, /, *operands: Value, names: tuple[str, ...] = (), **attrs: object
    ) -> Node:
        """Append the operation `op` and return its node.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        entry = find_op(op)
        for key, value in attrs.items():
            spec = entry.attrs.get(key)
            if isinstance(value, str) and spec is not None and spec.kind in ("axes", "words"):
                attrs[key] = (value,)
        return self.graph.append(
            entry,
            operands,
            attrs,
            names=names,
            loc=self.loc,
            origin=self.origin,
            before=self.before,
        )

    def value(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> Value:
        """Append the operation `op` and return its only result.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        (result,) = self.values(op, *operands, name=name, **attrs)
        return result

    def values(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> tuple[Value, ...]:
        """Append the operation `op` and return its results, of which the first may be named.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        names = () if name is None else (name,)
        return self.node(op, *operands, names=names, **attrs).results

    def clone(self, node: Node, *operands: Value, **attrs: object) -> Node:
        """Append `node` again, on other operands, and with other attributes where some are given.

        Raises:
          InputError: operands or attributes do not suit the operation.
        """
        names = tuple(v.name for v in node.results)
        return self.node(node.op.name, *operands, names=names, **{**node.attrs, **attrs})
