"""A graph without its opaque regions: what is between them, with inputs and outputs of its own."""

from __future__ import annotations

from moecc.ir.graph import Graph
from moecc.ir.structure import clone


def without_opaque(graph: Graph) -> Graph:
    """Return `graph` cut at its opaque regions, or itself where it has none.

    What a region makes becomes an input, and what one takes an output, by the name of the value.
    """
    if not any(node.op.opaque for node in graph):
        return graph
    made = clone(graph)
    opaque = [node for node in made if node.op.opaque]
    inside = {value for node in opaque for value in node.results}
    outputs = {n: v for n, v in made.outputs.items() if v not in inside}
    taken = (v for node in opaque for v in node.operands)
    outputs |= {v.name: v for v in taken if v.node is not None and v not in inside}
    for name in list(made.outputs):
        made.drop_output(name)
    for node in reversed(opaque):
        names = [value.name for value in node.results]
        for value, name in zip(node.results, names, strict=True):
            made.rename(value, made.fresh(name))
        inputs = (made.input(n, v.type) for n, v in zip(names, node.results, strict=True))
        node.replace_by(*inputs)
    for name, value in outputs.items():
        made.set_output(name, value)
    return made
