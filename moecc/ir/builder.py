"""A builder: operations as methods, with the current location and origin.

b = Builder(graph, loc="layers.0.ffn")
hidden = b.mul(b.silu(b.contract(x, gate, over="embed")), b.contract(x, up, over="embed"))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops import op


class Builder:
    """Appends nodes to a graph, or inserts them before a node.

    Every operation of the table is a method; it takes the operands, then the attributes by name,
    and ``name=`` for the result.  It returns the result, or a tuple where there are several.
    An attribute of kind ``axes`` or ``words`` may be given as one name.

    Attributes:
      graph: the graph that grows.
      loc: the location of the nodes made.
      origin: the pass and rewrite that make them.
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
        """Use another location for a while."""
        old, self.loc = self.loc, loc
        try:
            yield self
        finally:
            self.loc = old

    def node(self, name: str, *operands: Value, names: tuple[str, ...] = (), **attrs: Any) -> Node:
        """Append the operation `name` and return its node.

        Raises:
          InputError: operands or attributes do not suit the operation.
        """
        entry = op(name)
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

    def clone(self, node: Node, *operands: Value, **attrs: Any) -> Node:
        """Append `node` again, on other operands, and with other attributes where some are given.

        Raises:
          InputError: operands or attributes do not suit the operation.
        """
        names = tuple(v.name for v in node.results)
        return self.node(node.op.name, *operands, names=names, **{**node.attrs, **attrs})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        entry = op(name)

        def emit(*operands: Value, name: str | None = None, **attrs: Any) -> Any:
            names = () if name is None else (name,)
            node = self.node(entry.name, *operands, names=names, **attrs)
            return node.results[0] if len(node.results) == 1 else node.results

        return emit
