"""Print a graph as text: flat SSA, one line a node, which parses back to the same graph."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops import Attr, OpDef
from moecc.support.text import json_text

FORMAT = 1
"""The version of the text format, in its first line."""

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*\Z")
_WORDS = ("true", "false", "inf", "nan")


def format_word(text: str) -> str:
    """Return `text` bare where it reads back as a word, and quoted otherwise."""
    if _BARE.match(text) and text not in _WORDS:
        return text
    return json.dumps(text)


def format_number(value: float) -> str:
    """Return the shortest text that reads back as `value`."""
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return repr(value)


def format_attr(spec: Attr, value: Any) -> str:
    """Return the text of an attribute's value."""
    if spec.kind == "bool":
        return "true" if value else "false"
    if spec.kind == "float":
        return format_number(value)
    if spec.kind in ("str", "axis"):
        return format_word(value)
    if spec.kind in ("axes", "words"):
        return str(value[0]) if len(value) == 1 else f"({', '.join(value)})"
    if spec.kind == "sizes":
        return f"({', '.join(f'{n}={s}' for n, s in value)})"
    return str(value)


def format_attrs(entry: OpDef, attrs: Mapping[str, object]) -> str:
    """Return the attributes that differ from their defaults, in braces, or nothing."""
    parts = [
        f"{name}={format_attr(spec, attrs[name])}"
        for name, spec in entry.attrs.items()
        if spec.kind != "region" and attrs[name] != spec.default
    ]
    return f" {{{', '.join(parts)}}}" if parts else ""


def format_loc(loc: str, origin: str) -> str:
    """Return the location and origin as printed at the end of a line."""
    if not loc and not origin:
        return ""
    return f" @{loc} by {origin}" if origin else f" @{loc}"


def format_node(node: Node) -> str:
    """Return the line of one node, without indentation and without its body."""
    results = ", ".join(["%" + v.name for v in node.results])
    operands = "".join([" %" + v.name + "," for v in node.operands])[:-1]
    attrs = format_attrs(node.op, node.attrs) if node.attrs else ""
    types = ", ".join([str(v.type) for v in node.results])
    loc = format_loc(node.loc, node.origin) if node.loc or node.origin else ""
    return f"{results} = {node.op.name}{operands}{attrs} : {types}{loc}"


def _format_param(value: Value) -> str:
    return f"param %{value.name} : {value.type}{_format_weight(value)}{format_loc(value.loc, '')}"


def _format_weight(value: Value) -> str:
    if value.weight is None:
        return ""
    from moecc.weights.text import format_expr

    return f" = {format_expr(value.weight)}"


def lines(graph: Graph) -> Iterator[str]:
    """Yield the lines of a graph's text."""
    yield f"moecc {FORMAT}"
    yield f"graph {graph.name} {{"
    for key, value in graph.attrs.items():
        yield f"  attr {key} = {json_text(value)}"
    yield from _inputs(graph, "  ")
    for value in graph.params.values():
        yield "  " + _format_param(value)
    yield from _computation(graph, "  ")
    yield "}"


def _inputs(graph: Graph, indent: str) -> Iterator[str]:
    for value in graph.inputs.values():
        yield f"{indent}input %{value.name} : {value.type}"


def _computation(graph: Graph, indent: str) -> Iterator[str]:
    """Yield the lines of nodes, their bodies in braces, and the outputs."""
    for node in graph:
        body = node.body
        yield indent + format_node(node) + (" {" if body is not None else "")
        if body is not None:
            yield from _inputs(body, indent + "  ")
            yield from _computation(body, indent + "  ")
            yield indent + "}"
    for name, value in graph.outputs.items():
        yield f"{indent}output {name} = %{value.name}"


def print_graph(graph: Graph) -> str:
    """Return the text of `graph`; `parse` reads it back to an equal graph."""
    return "\n".join(lines(graph)) + "\n"
