"""A graph and its rewrite as a page: layers folded, nodes with weights and origin, a search."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from moecc.ir.graph import Graph, Node
from moecc.ir.printer import format_attrs
from moecc.support.page import page, table
from moecc.weights.text import format_expr

_STYLE = """
body { max-width: 96rem } details { margin: .15rem 0 } summary { cursor: pointer }
.sides { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)) }
@media (max-width: 60rem) { .sides { grid-template-columns: minmax(0, 1fr) } }
section { min-width: 0 } code { overflow-wrap: anywhere }
.node { margin-left: 1.2rem } .node dl { margin: .2rem 0 .6rem 1.2rem; font-size: 14px }
dt { font-weight: 600 } dd { margin-left: 1rem; overflow-wrap: anywhere }
.made > summary code { border-left: 3px solid #2a7de1; padding-left: .4rem }
[hidden] { display: none } input { font: inherit; padding: .3rem; width: min(24rem, 90%) }
"""

# What is searched for is shown, and its layer is unfolded; without a word all is folded again.
_SCRIPT = """
const find = document.getElementById("find"), count = document.getElementById("count");
function search() {
  const word = find.value.trim().toLowerCase();
  let shown = 0;
  for (const group of document.querySelectorAll(".group")) {
    let here = 0;
    for (const node of group.querySelectorAll(".node")) {
      node.hidden = word !== "" && !node.textContent.toLowerCase().includes(word);
      here += !node.hidden;
    }
    group.hidden = here === 0;
    group.open = word !== "" && here > 0;
    shown += here;
  }
  count.textContent = word ? shown + " nodes" : "";
}
find.addEventListener("input", search);
"""


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
    sides = [("before" if after is not None else "graph", before)]
    if after is not None:
        sides.append(("after", after))
    body = [
        table(("", ""), [("pipeline", pipeline or "none"), *_facts(sides)]),
        '<p><input type="search" id="find" placeholder="an operation, a place, a weight" '
        'aria-label="search the nodes"> <output id="count"></output></p>',
        '<div class="sides">', *(_side(title, graph) for title, graph in sides), "</div>",
    ]  # fmt: skip
    if remarks:
        items = "".join(f"<li>{escape(remark)}</li>" for remark in dict.fromkeys(remarks))
        body += ["<h2>Remarks</h2>", f"<ul>{items}</ul>"]
    return page(f"graph {before.name}", body, figures=False, style=_STYLE, script=_SCRIPT)


def _facts(sides: Sequence[tuple[str, Graph]]) -> Iterator[tuple[str, str]]:
    for title, graph in sides:
        yield title, f"{len(graph):,} nodes, {len(graph.params):,} parameters"


def _side(title: str, graph: Graph) -> str:
    parts = [f"<section><h2>{escape(title)}</h2>"]
    ends = [(f"input %{n}", str(v.type)) for n, v in graph.inputs.items()]
    ends += [(f"output {n}", f"%{v.name} : {v.type}") for n, v in graph.outputs.items()]
    parts.append(table(("", ""), ends))
    parts += [_folded(group) for group in _groups(graph)]
    return "\n".join([*parts, "</section>"])


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


def _folded(group: _Group) -> str:
    first, last, number = group.places[0], group.places[-1], len(group.places)
    place = (first or "of no layer") + (f" … {last}, {number} alike" if number > 1 else "")
    made = any(node.origin for node in group.nodes)
    nodes = "\n".join(map(_node, group.nodes))
    return (
        f'<details class="group{" made" if made else ""}"><summary><code>{escape(place)}</code> '
        f"{len(group.nodes)}&nbsp;node{'s' if len(group.nodes) > 1 else ''}</summary>"
        f"{nodes}</details>"
    )


def _node(node: Node) -> str:
    results = ", ".join(f"%{v.name}" for v in node.results)
    operands = ", ".join(f"%{v.name}" for v in node.operands)
    rows = [("type", ", ".join(str(v.type) for v in node.results))]
    if attrs := format_attrs(node.op, node.attrs).strip():
        rows.append(("attributes", attrs))
    rows.append(("made by", node.origin or "the importer"))
    for value in node.operands:
        if value.is_param:
            weight = "" if value.weight is None else f" = {format_expr(value.weight)}"
            rows.append((f"parameter %{value.name}", f"{value.type}{weight}"))
    facts = "".join(f"<dt>{escape(n)}</dt><dd>{escape(text)}</dd>" for n, text in rows)
    line = f"{results} = {node.op.name} {operands}"
    return (
        f'<details class="node{" made" if node.origin else ""}"><summary><code>{escape(line)}'
        f"</code></summary><dl>{facts}</dl></details>"
    )
