"""Undo an earlier specialisation, so that a graph may change its mode."""

from __future__ import annotations

from collections.abc import Callable

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.replace import replace_value
from moecc.rewrite import P, fits
from moecc_passes.routed import RoutedLayer, routed_layers

ORIGIN = "specialize/"
"""The prefix of the origins of added nodes."""


def is_added(value: Value) -> bool:
    """Return whether a specialisation made `value`."""
    return value.node is not None and _made_here(value.node)


def undo(graph: Graph, covers: Callable[[str], bool]) -> None:
    """Remove all additions of specialisations, including a key that becomes unused.

    Args:
      graph: the graph.
      covers: returns whether a location is affected.
    """
    for layer in routed_layers(graph):
        if covers(layer.assigner.loc):
            _undo_slots(layer)
    for node in (*graph, graph.terminator):
        if not _made_here(node):
            _undo_operands(node, covers)
    for node in graph.walk_back():
        if node.is_dead and _made_here(node):
            node.erase()
    keys = [n for n, v in graph.inputs.items() if v.type.dtype.kind == "key" and not v.users]
    for name in keys:
        graph.erase_input(name)


def _made_here(node: Node) -> bool:
    return node.origin.startswith(ORIGIN)


def _undo_slots(layer: RoutedLayer) -> None:
    kept = {w: v for w, v in layer.given().items() if not is_added(v)}
    if kept != layer.given():
        reassign_slots(layer.assigner, kept, {})


def _undo_operands(node: Node, covers: Callable[[str], bool]) -> None:
    for index, value in enumerate(node.operands):
        if not is_added(value) or value.node is None or not covers(value.node.loc):
            continue
        before = original(value)
        # An output may be an added mask or number, which has no original.
        if before is not value and before.type == value.type:
            node.set_operand(index, before)


def original(value: Value) -> Value:
    """Return the value that specialisations changed to `value`."""
    while is_added(value) and (found := fits(CHANGED, value.node)):
        value = found.value("x")
    return value


_x = P.any("x")

CHANGED = (
    # Jitter, noise, and the end of rescaled gates.
    P.mul(_x, P.random_uniform(P.any(), P.any()))
    | P.add(_x, P.random_normal(P.any(), P.any()))
    | P.mul(_x, P.div(P.any(), P.any()))
    | P.mask(_x, P.any())
    # Dropout.
    | P.select(P.any(), P.constant(), _x)
    | P.scale(_x)
)
"""How a specialisation changes a value, one step each; see `moecc.ir.mixtures`."""


def reassign_slots(old: Node, given: dict[str, Value], attrs: dict[str, object]) -> Node:
    """Replace the assigning node `old` by one with other operands and attributes."""
    graph = old.graph
    allowed = old.op.attrs["using"].choices
    more = {w: v for w, v in given.items() if w in allowed}
    made = graph.append(
        old.op,
        [old.operands[0], *more.values()],
        {**old.attrs, **attrs, "using": tuple(more)},
        names=[v.name for v in old.results],
        loc=old.loc,
        origin=old.origin,
        before=old,
    )
    for before, after in zip(old.results, made.results, strict=True):
        name = before.name
        replace_value(before, after)
        graph.rename(before, graph.fresh(f"{name}.old"))
        graph.rename(after, name)
    old.erase()
    return made
