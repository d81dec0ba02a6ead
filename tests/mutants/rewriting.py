"""Passes made of a function that changes a graph, and what such functions are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from moecc.errors import InputError
from moecc.ir import Builder, Graph, Node, Value, clone
from moecc.ir.structure import infer_again, replace_value
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves

Rewrite = Callable[[Graph], int]
"""Changes a graph in place and returns at how many places."""

EXACT = Preserves("exact")
REASSOCIATION = Preserves("reassociation")


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that applies a function, and promises what it is told to promise."""

    name: ClassVar[str] = "mutant"
    summary: ClassVar[str] = "apply a rewrite that may be wrong"
    rewrite: Rewrite
    promise: Preserves = REASSOCIATION

    @property
    def preserves(self) -> Preserves:
        return self.promise

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        try:
            self.rewrite(clone(graph))
        except InputError:
            # The types refuse the mistake here; elsewhere they will not.
            return PassResult(changed=False)
        count = self.rewrite(graph)
        return PassResult(changed=count > 0, matched=count)


def nodes(graph: Graph, *ops: str) -> Iterator[Node]:
    """Yield the nodes of the operations `ops`, as they are now."""
    yield from [n for n in graph if n.op.name in ops]


def maker(value: Value, *ops: str) -> Node | None:
    """Return the node that defines `value`, if it is one of the operations `ops`."""
    node = value.node
    return node if node is not None and node.op.name in ops else None


def before(node: Node) -> Builder:
    return Builder(node.graph, loc=node.loc, origin="mutant/rule", before=node)


def exchange(node: Node, value: Value) -> int:
    """Replace the result of `node` by `value`; one of another type is not left behind."""
    if value.type != node.result.type:
        if value.node is not None and not value.users:
            value.node.erase()
        return 0
    replace_value(node.result, value)
    node.erase()
    return 1


def set_attr(node: Node, name: str, value: object) -> int:
    """Change an attribute, and infer again what follows."""
    if node.attrs[name] == value:
        return 0
    node.attrs[name] = value
    infer_again(node.graph, [node], start=node)
    return 1


def each(rewrite: Callable[[Node], int], *ops: str) -> Rewrite:
    """Return the rewrite that applies `rewrite` to every node of the operations `ops`."""

    def apply(graph):
        return sum(rewrite(n) for n in nodes(graph, *ops) if n.alive)

    apply.__name__ = rewrite.__name__
    return apply


def named(*rewrites: Rewrite) -> dict[str, Pass]:
    """Return passes by the names of the functions that they apply."""
    return {r.__name__: RewritePass(r) for r in rewrites}
