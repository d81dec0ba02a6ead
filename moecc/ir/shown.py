"""A graph at a prompt and in a notebook: its size and its ends, never its whole text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Protocol

from moecc.ir.operand import Definition, Operand
from moecc.support.text import brief, facts_table

SHOWN_OPERATIONS = 12


class _Graph(Protocol):
    """What of a graph is shown; `moecc.ir.graph.Graph`."""

    name: str

    @property
    def inputs(self) -> Mapping[str, Operand]: ...

    @property
    def outputs(self) -> Mapping[str, Operand]: ...

    @property
    def params(self) -> Mapping[str, Operand]: ...

    def every_node(self) -> Iterator[Definition]: ...


class ShownGraph:
    """The line and the table of a graph."""

    def __repr__(self: _Graph) -> str:
        nodes = sum(1 for _ in self.every_node())
        rows = [
            ("", self.name), ("nodes", f"{nodes:,}"), ("parameters", f"{len(self.params):,}"),
            ("inputs", " ".join(self.inputs)), ("outputs", " ".join(self.outputs)),
        ]  # fmt: skip
        return brief("moecc.Graph", rows)

    def _repr_html_(self: _Graph) -> str:
        return facts_table(_rows(self))


def _rows(graph: _Graph) -> Iterator[tuple[str, str]]:
    """Yield what the table says: ends with their types, and which operations there are."""
    counts = Counter(node.op.name for node in graph.every_node())
    yield "graph", graph.name
    yield from ((f"input {name}", str(value.type)) for name, value in graph.inputs.items())
    yield from ((f"output {name}", str(value.type)) for name, value in graph.outputs.items())
    yield "parameters", f"{len(graph.params):,}"
    yield "nodes", f"{counts.total():,}"
    most = [f"{name} × {count}" for name, count in counts.most_common(SHOWN_OPERATIONS)]
    more = len(counts) - len(most)
    yield "operations", ", ".join([*most, *([f"and {more} more"] if more > 0 else [])])
