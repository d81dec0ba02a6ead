"""A graph and its rewrite as a page: layers folded, nodes with weights and origin, a search."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from moecc.ir.graph import Graph, Node
from moecc.ir.text import format_attrs
from moecc.support.page import render_page
from moecc.weights.text import format_expr


@dataclass
class _Group:
    """Nodes of one place in the model, and the places whose nodes are alike."""

    nodes: list[Node]
    places: list[str] = field(default_factory=list)


def graph_page(
    before: Graph, after: Graph | None = None, pipeline: str = "", remarks: Sequence[str] = ()
) -> str:
    """Return the page of a graph, and of what a pipeline made of it.

    Args:
      before: the graph.
      after: the rewritten one, if it was.
      pipeline: the passes between the two.
      remarks: what they reported.
    """
    graphs = {"graph": before} if after is None else {"before": before, "after": after}
    counts = [
        (title, f"{len(graph):,} nodes, {len(graph.params):,} parameters")
        for title, graph in graphs.items()
    ]
    return render_page(
        "graph.html", f"graph {before.name}", scripts=("search.js",),
        facts=[("pipeline", pipeline or "none"), *counts],
        sides=[_side(title, graph) for title, graph in graphs.items()],
        remarks=list(dict.fromkeys(remarks)),
    )  # fmt: skip


def _side(title: str, graph: Graph) -> dict[str, object]:
    ends = [(f"input %{n}", str(v.type)) for n, v in graph.inputs.items()]
    ends += [(f"output {n}", f"%{v.name} : {v.type}") for n, v in graph.outputs.items()]
    return {"title": title, "ends": ends, "groups": map(_layer, _groups(graph))}


def _groups(graph: Graph) -> list[_Group]:
    """Return the nodes by place; places that do the same are one group."""
    found: dict[tuple[str, ...], _Group] = {}
    for place, some in groupby(graph.every_node(), key=lambda node: node.loc):
        nodes = list(some)
        key = (re.sub(r"\d+", "#", place), *map(_alike, nodes))
        found.setdefault(key, _Group(nodes)).places.append(place)
    return list(found.values())


def _alike(node: Node) -> str:
    # A type may name the value that sets a size of it, each layer its own.
    types = ", ".join(re.sub(r"%[\w.]+", "%", str(v.type.bare)) for v in node.results)
    return f"{node.op.name}{format_attrs(node.op, node.attrs)}{types}{node.origin}"


def _layer(group: _Group) -> dict[str, object]:
    first, last, number = group.places[0], group.places[-1], len(group.places)
    return {
        "title": (first or "of no layer") + (f" … {last}, {number} alike" if number > 1 else ""),
        "made": any(node.origin for node in group.nodes),
        "nodes": [_node(node) for node in group.nodes],
    }


def _node(node: Node) -> dict[str, object]:
    results = ", ".join(f"%{v.name}" for v in node.results)
    operands = ", ".join(f"%{v.name}" for v in node.operands)
    facts = [("type", ", ".join(str(v.type) for v in node.results))]
    if attrs := format_attrs(node.op, node.attrs).strip():
        facts.append(("attributes", attrs))
    facts.append(("made by", node.origin or "the importer"))
    for value in node.operands:
        if value.is_param:
            weight = "" if value.weight is None else f" = {format_expr(value.weight)}"
            facts.append((f"parameter %{value.name}", f"{value.type}{weight}"))
    title = f"{results} = {node.op.name} {operands}"
    return {"title": title, "made": bool(node.origin), "facts": facts}
