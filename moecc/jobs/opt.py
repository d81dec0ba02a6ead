"""``moecc opt``: run passes over a graph; text in, text out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.text import format_attrs, read_graph
from moecc.jobs.command import (
    AllowUnmatched,
    Force,
    GraphFile,
    Load,
    Output,
    OutputFile,
    PipelineText,
    Report,
    Seed,
    Spelling,
    artefact,
    check_writable,
    graph_text,
    read_pipeline,
    write_whole,
)
from moecc.support.console import say
from moecc.support.page import render_page
from moecc.support.untyped import JsonDict

# A graph and its rewrite as a page: layers folded, nodes with weights and origin, a search.


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
        sides=[_Side(title, graph).values() for title, graph in graphs.items()],
        remarks=list(dict.fromkeys(remarks)),
    )  # fmt: skip


_STEP = re.compile(r"(?:\{[^}]*\}|[^.])+(?:\.(?:\d+|\{[^}]*\}))?")
"""A step of a location: a name, with the number or the numbers of a layer behind it."""


class _Side:
    """What a page shows of one graph: its groups, nested by location, and the edges of its nodes.

    Attributes:
      groups: the nodes by place; places that do the same are one group.
      boxes: the group of each node, and its number in the group; those of places that are alike
        are the first place's.
      sources: the value outside of the bodies of loops that each input of a body stands for.
    """

    def __init__(self, title: str, graph: Graph) -> None:
        self.title, self.graph = title, graph
        self.groups: list[_Group] = []
        self.boxes: dict[Node, tuple[int, int]] = {}
        self.sources: dict[Value, Value] = {}
        numbers: dict[tuple[str, ...], int] = {}
        for location, some in groupby(graph.every_node(), key=lambda node: node.loc):
            nodes = list(some)
            key = (re.sub(r"\d+", "#", location), *map(_alike, nodes))
            number = numbers.setdefault(key, len(self.groups))
            if number == len(self.groups):
                self.groups.append(_Group(nodes))
            self.groups[number].places.append(location)
            self.boxes.update((node, (number, at)) for at, node in enumerate(nodes))
            for node in nodes:
                if node.body is not None:
                    bound = zip(node.body.inputs.values(), node.operands, strict=False)
                    self.sources.update(bound)

    def values(self) -> JsonDict:
        """Return the values of the template."""
        inputs, outputs = self.graph.inputs.items(), self.graph.outputs.items()
        ends = [(f"input %{n}", str(v.type)) for n, v in inputs]
        ends += [(f"output {n}", f"%{v.name} : {v.type}") for n, v in outputs]
        places = (
            (group.places[0] or "of no layer")
            + (f" × {len(group.places)}" if len(group.places) > 1 else "")
            for group in self.groups
        )
        labels = [
            (label, self._anchor(number), any(node.origin for node in self.groups[number].nodes))
            for number, label in enumerate(places)
        ]
        edges = [
            (maker[0], number)
            for node, (number, _) in self.boxes.items()
            for value in node.operands
            if (maker := self._maker(value)) is not None and maker[0] != number
        ]
        tree = {"title": "", "groups": []}
        for number, group in enumerate(self.groups):
            self._add(tree, number, group)
        drawing = _drawing(labels, edges)
        return {"title": self.title, "ends": ends, "drawing": drawing, "groups": tree["groups"]}

    def _add(self, tree: JsonDict, number: int, group: _Group) -> None:
        """Add a group under the steps of its location, next to those with the same first ones."""
        parent, (*steps, _) = tree, _STEP.findall(group.places[0]) or [""]
        for at, step in enumerate(steps, 1):
            last = parent["groups"][-1] if parent["groups"] else None
            if last is None or last["step"] != step:
                places = dict.fromkeys(".".join(_STEP.findall(p)[:at]) for p in group.places)
                parent["groups"].append({
                    "step": step, "title": _range(list(places)), "anchor": "", "groups": [],
                    "nodes": [], "made": False, "drawing": None,
                })  # fmt: skip
            parent = parent["groups"][-1]
            parent["made"] |= any(node.origin for node in group.nodes)
        parent["groups"].append(self._leaf(number, group))

    def _leaf(self, number: int, group: _Group) -> JsonDict:
        labels = [
            (n.op.name, self._anchor(number, at), bool(n.origin))
            for at, n in enumerate(group.nodes)
        ]
        edges = [
            (maker[1], at)
            for at, node in enumerate(group.nodes)
            for value in node.operands
            if (maker := self._maker(value)) is not None and maker[0] == number and maker[1] < at
        ]
        return {
            "step": None, "title": _alike_text(group.places), "anchor": self._anchor(number),
            "made": any(node.origin for node in group.nodes), "groups": [],
            "nodes": [self._node(number, at, node) for at, node in enumerate(group.nodes)],
            "drawing": _drawing(labels, edges) if edges else None,
        }  # fmt: skip

    def _maker(self, value: Value) -> tuple[int, int] | None:
        """Return the box of the node that makes a value; None for inputs and parameters."""
        value = self.sources.get(value, value)
        return None if value.node is None else self.boxes[value.node]

    def _anchor(self, group: int, at: int | None = None) -> str:
        return f"{self.title}-{group}" + ("" if at is None else f"-{at}")

    def _node(self, number: int, at: int, node: Node) -> JsonDict:
        results = ", ".join(f"%{v.name}" for v in node.results)
        operands = ", ".join(f"%{v.name}" for v in node.operands)
        facts = [("type", ", ".join(str(v.type) for v in node.results))]
        if attrs := format_attrs(node.op, node.attrs).strip():
            facts.append(("attributes", attrs))
        facts.append(("made by", node.origin or "the importer"))
        for value in node.operands:
            if value.is_param:
                weight = "" if value.weight is None else f" = {value.weight}"
                facts.append((f"parameter %{value.name}", f"{value.type}{weight}"))
        makers = {f"%{v.name}": m for v in node.operands if (m := self._maker(v)) is not None}
        users = [user for value in node.results for user in value.users if user in self.boxes]
        used_by = {f"%{n.results[0].name}": self.boxes[n] for n in users if n.results}
        edges = [
            (kind, [(name, self._anchor(*box)) for name, box in boxes.items()])
            for kind, boxes in (("takes", makers), ("used by", used_by))
            if boxes
        ]
        title = f"{results} = {node.op.name} {operands}"
        return {
            "title": title, "anchor": self._anchor(number, at), "made": bool(node.origin),
            "facts": facts, "edges": edges,
        }  # fmt: skip


def _alike(node: Node) -> str:
    # A type may name the value that sets a size of it, each layer its own.
    types = ", ".join(re.sub(r"%[\w.]+", "%", str(v.type.bare)) for v in node.results)
    return f"{node.op.name}{format_attrs(node.op, node.attrs)}{types}{node.origin}"


def _range(places: Sequence[str]) -> str:
    first, last = places[0], places[-1]
    return (first or "of no layer") + (f" … {last}" if len(places) > 1 else "")


def _alike_text(places: Sequence[str]) -> str:
    return _range(places) + (f", {len(places)} alike" if len(places) > 1 else "")


_LINE, _GAP, _LETTER = 44, 14, 8
"""The height of a row, the space between boxes and the width of a letter, in pixels."""

_TOP, _BOX, _LANE = 14, 24, 6
"""The space above the box of a row, its height, and the width of a value that passes a row."""

_Point = int | tuple[int, int]
"""A box, or the lane of a box's value in a row that it passes."""


def _drawing(labels: Sequence[tuple[str, str, bool]], edges: Iterable[tuple[int, int]]) -> JsonDict:
    """Return boxes in rows, and the lines between them from top to bottom.

    A value that passes rows has a lane there between the boxes, one for all that it leads to.

    Args:
      labels: of each box the text, the anchor that it leads to, and whether a pass made some of
        it, in the order of the program.
      edges: pairs of boxes.  One that leads back, as from a layer to the next one like it, is
        dashed, goes around all boxes at the right, and no row depends on it.
    """
    edges = sorted(set(edges))
    rows, lanes = [0] * len(labels), dict[int, int]()
    for source, target in edges:
        if source < target:
            rows[target] = max(rows[target], rows[source] + 1)
    for source, target in edges:
        if source < target:
            lanes[source] = max(lanes.get(source, 0), rows[target] - 1)

    def point(box: int, row: int) -> _Point:
        return box if row == rows[box] else (box, row)

    sources: dict[_Point, list[_Point]] = {box: [] for box in range(len(labels))}
    for source, target in edges:
        if source < target:
            sources[target].append(point(source, rows[target] - 1))
    for box, last in lanes.items():
        sources |= {(box, r): [point(box, r - 1)] for r in range(rows[box] + 1, last + 1)}
    by_row: list[list[_Point]] = [[] for _ in range(max(rows, default=0) + 1)]
    for each in sources:
        by_row[rows[each] if isinstance(each, int) else each[1]].append(each)
    middles, right = dict[_Point, float](), 0.0
    for points in by_row:
        # Below the mean of its sources, if there is room.
        wanted = {p: sum(middles[s] for s in sources[p]) / max(1, len(sources[p])) for p in points}
        end = 4.0
        for each in sorted(points, key=lambda p: wanted[p]):
            width = len(labels[each][0]) * _LETTER + 12 if isinstance(each, int) else _LANE
            left = max(end, wanted[each] - width / 2)
            middles[each], end = left + width / 2, left + width + _GAP
        right = max(right, end)
    loop = right + _GAP if any(a >= b for a, b in edges) else right

    def top(row: int) -> int:
        return row * _LINE + _TOP

    def hop(source: _Point, target: _Point, row: int) -> str:
        """Return the line from a point to one in the next row, which is `row`."""
        x1, x2, y1, y2 = middles[source], middles[target], top(row - 1) + _BOX, top(row)
        middle = (y1 + y2) // 2
        return f"M{x1:.0f} {y1}C{x1:.0f} {middle} {x2:.0f} {middle} {x2:.0f} {y2}"

    def around(a: int, b: int) -> str:
        """Return the line from below a box to above another, at the right of all boxes."""
        x1, x2, y1, y2 = middles[a], middles[b], top(rows[a]) + _BOX, top(rows[b])
        return (
            f"M{x1:.0f} {y1}q0 9 9 9H{loop - 9:.0f}q9 0 9 -9V{y2}q0 -9 -9 -9H{x2 + 9:.0f}q-9 0 -9 9"
        )

    passing = [(p, p[1]) for p in sources if not isinstance(p, int)]
    lines = [(f"{hop(sources[p][0], p, r)}V{top(r) + _BOX}", "") for p, r in passing]
    lines += [
        (hop(point(a, rows[b] - 1), b, rows[b]), "end") if a < b else (around(a, b), "back")
        for a, b in edges
    ]
    return {
        "width": round(loop),
        "height": _LINE * len(by_row) + _TOP,
        "boxes": [
            {"text": text, "anchor": anchor, "made": is_made, "middle": round(middles[box]),
             "x": round(middles[box]) - (width := len(text) * _LETTER + 12) // 2, "width": width,
             "y": top(rows[box]), "height": _BOX}
            for box, (text, anchor, is_made) in enumerate(labels)
        ],
        "lines": [{"path": path, "kind": kind} for path, kind in lines],
    }  # fmt: skip


# Graphs as Model Explorer reads them: one collection, nodes nested by their location.


def explorer_collection(graphs: Mapping[str, Graph]) -> JsonDict:
    """Return graphs by title as a collection for Model Explorer, a JSON object."""
    rows = [{"id": title, "nodes": _explorer_nodes(graph)} for title, graph in graphs.items()]
    return {"label": next(iter(graphs.values())).name, "graphs": rows}


def _explorer_nodes(graph: Graph) -> list[JsonDict]:
    nodes: list[JsonDict] = []
    sources: dict[Value, tuple[str, int]] = {}

    def add(id: str, label: str, loc: str, operands: Iterable[Value], results: Sequence[Value],
            **attrs: str) -> None:  # fmt: skip
        edges = [
            {"sourceNodeId": sources[v][0], "sourceNodeOutputId": str(sources[v][1]),
             "targetNodeInputId": str(i)}
            for i, v in enumerate(operands)
        ]  # fmt: skip
        sources.update((v, (id, i)) for i, v in enumerate(results))
        # A step of a place ends at a dot, but not at those of {0..29}.
        namespace = re.sub(r"(?<!\.)\.(?!\.)", "/", loc)
        nodes.append({
            "id": id, "label": label, "namespace": namespace, "incomingEdges": edges,
            "attrs": [{"key": k, "value": v} for k, v in attrs.items() if v],
            "outputsMetadata": [
                {"id": str(i), "attrs": [{"key": "tensor_shape", "value": str(v.type)}]}
                for i, v in enumerate(results)
            ],
        })  # fmt: skip

    def walk(graph: Graph, prefix: str) -> None:
        for value in (*graph.inputs.values(), *graph.params.values()):
            if value in sources:
                continue
            weight = "" if value.weight is None else str(value.weight)
            user = next(iter(value.users), None)
            loc = user.loc if value.is_param and user is not None else ""
            kind = "param" if value.is_param else "input"
            add(f"{prefix}{value.name}", f"{kind} %{value.name}", loc, (), [value], weight=weight)
        for node in graph:
            id, operands = f"{prefix}{node.results[0].name}", node.operands
            if node.body is not None:
                bound = zip(node.body.inputs.values(), node.operands, strict=False)
                sources.update((inner, sources[v]) for inner, v in bound)
                walk(node.body, f"{id}/")
                operands = list(node.body.outputs.values())
            attrs = format_attrs(node.op, node.attrs).strip()
            add(id, node.op.name, node.loc, operands, node.results, attributes=attrs,
                origin=node.origin)  # fmt: skip

    walk(graph, "")
    for name, value in graph.outputs.items():
        add(f"output {name}", f"output {name}", "", [value], [])
    return nodes


def opt(
    file: GraphFile,
    *,
    pipeline: PipelineText = "",
    output: Output = None,
    print_before: Annotated[str | None, Spelling("all|NAME,…")] = None,
    print_after: Annotated[str | None, Spelling("all|changed|NAME,…")] = None,
    diff: bool = False,
    dump_dir: Annotated[str | None, Spelling("DIR")] = None,
    check: bool = False,
    timing: bool = False,
    stats: bool = False,
    remarks: bool = False,
    seed: Seed = 0,
    allow_unmatched: AllowUnmatched = False,
    load: Load = (),
    html: OutputFile = None,
    explorer: OutputFile = None,
    force: Force = False,
) -> Report:
    """Run a pipeline over a graph, verified after every pass.

    The graph goes to stdout or -o, everything else to stderr.

    Args:
      print_before: Print the graph to standard error before all passes, or those named.
      print_after: Print the graph to standard error after all passes, those that changed it, or
        those named.
      diff: Print the changes of each pass as a unified diff.
      dump_dir: Folder to write the graph to after each pass: 000_input.moe, 001_canonicalize.moe.
      check: Hold each pass to its promise: prove it, or let the reference interpreter compare
        before and after, on the graph at reduced sizes and random data.
      timing: Print the time that each pass and the verifier took.
      stats: Print the counts of each pass, and of its rules the hits, attempts and time.
      remarks: Print remarks of passes, and near misses with the reason.
      html: File to write a page to, with the graph before and after side by side, the type,
        weight expression and origin of each node, and a search.
      explorer: File to write the graph to as JSON for Model Explorer, before and after.

    Example:
      moecc import SmolLM2-135M | moecc opt - -p 'upcycle{experts=8}' --diff
    """
    from moecc.ir.structure import clone
    from moecc.rewrite import runner
    from moecc.rewrite.passes import Context
    from moecc.rewrite.runner import temporary_folder

    def names(stated: str, *words: str) -> str | frozenset[str]:
        return stated if stated in words else frozenset(n.strip() for n in stated.split(","))

    passes = read_pipeline(pipeline, load)
    for path in (output, html, explorer):
        check_writable(path, force=force)
    instruments: list[runner.Instrument] = []
    if print_before is not None:
        instruments.append(runner.PrintBefore(names(print_before, "all"), sys.stderr))
    if print_after is not None:
        instruments.append(runner.PrintAfter(names(print_after, "all", "changed"), sys.stderr))
    if dump_dir is not None:
        instruments.append(runner.DumpFolder(Path(dump_dir)))
    kinds = {runner.DiffAfter: diff, runner.Timing: timing, runner.StatisticsTable: stats,
             runner.Remarks: remarks}  # fmt: skip
    instruments += [kind(sys.stderr) for kind, is_wanted in kinds.items() if is_wanted]
    graph, said, checked = read_graph(file), list[str](), list[JsonDict]()
    before = graph if html is None and explorer is None else clone(graph)
    context = Context(seed, allow_unmatched, remark=lambda remark: said.append(str(remark)))
    if check:
        from moecc.jobs.checks import PassProofs, check_pipeline

        proofs = PassProofs()
        instruments.append(proofs)
    folder = partial(Path, dump_dir) if dump_dir else temporary_folder
    report = runner.run_pipeline(
        graph, passes, context=context, instruments=instruments, crash_folder=folder
    )
    idle = [run.item.name for run in report.runs if not run.result.changed]
    # Printed graphs are parsed, diffs are applied.
    if idle and print_before is None and print_after is None and not diff:
        say(f"note: {', '.join(idle)} changed nothing{'' if remarks else ' (--remarks has why)'}")
    if check:
        plain = Context(seed, allow_unmatched)
        for done in check_pipeline(proofs.source, passes, context=plain, proofs=proofs.proofs):
            say(f"checked: {done}")
            checked.append(done.to_json())
    if html is not None:
        page = graph_page(before, graph if len(passes) else None, str(passes), said)
        write_whole(html, page.encode(), force=force)
        say(f"the graph is in {html}")
    if explorer is not None:
        graphs = {"before": before, "after": graph} if len(passes) else {"graph": graph}
        write_whole(explorer, json.dumps(explorer_collection(graphs)).encode(), force=force)
        say(f"the graph for Model Explorer is in {explorer}")
    text = graph_text(graph, output)
    return artefact(
        "opt", text, output, force=force, pipeline=str(passes), remarks=said, checked=checked,
        passes=report.as_dict()["passes"],
    )  # fmt: skip
