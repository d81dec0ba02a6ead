"""Protocols through which the operation table sees a graph: operands, definitions and regions.

The table is imported by graphs, whose nodes refer to its rows.  Its rules read types and sometimes
the operation that defines an operand (whose slots an ``assign_slots`` counts), so they are written
against these protocols; `moecc.ir.graph` has the classes that implement them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from moecc.support.untyped import Json, JsonDict
from moecc.types import TensorType

Attrs = Json
"""Attributes of a node, complete: every attribute of the table entry has a value."""


class OperationRow(Protocol):
    """A row of the operation table; `moecc.ir.operation.OpDef` documents its columns."""

    @property
    def name(self) -> str:
        """The name in the text format."""
        ...

    @property
    def linear(self) -> tuple[int, ...]:
        """Positions of the operands in which it is linear."""
        ...

    @property
    def jointly(self) -> bool:
        """Whether it is linear only in all of `linear` together."""
        ...

    @property
    def mixes(self) -> Callable[[Sequence[Operand], Attrs], tuple[str, ...]]:
        """The operand axes that it mixes."""
        ...

    @property
    def assigns_slots(self) -> bool:
        """Whether its last result holds the slot of each choice."""
        ...


class Region(ABC):
    """A container of values that may be an attribute of a node: a graph.

    Attributes:
      attrs: JSON values; the mesh is one of them.
    """

    attrs: JsonDict

    @abstractmethod
    def __iter__(self) -> Iterator[Definition]:
        """Yield the nodes in order."""


class Operand(Protocol):
    """A value that a node takes; `moecc.ir.graph.Value`."""

    @property
    def name(self) -> str:
        """Its name in the graph, without ``%``."""
        ...

    @property
    def type(self) -> TensorType:
        """Its type."""
        ...

    @property
    def graph(self) -> Region:
        """The graph that it belongs to."""
        ...

    @property
    def node(self) -> Definition | None:
        """The node that defines it, or None for an input or a parameter."""
        ...


class Definition(Protocol):
    """The node that defines an operand; `moecc.ir.graph.Node`."""

    @property
    def op(self) -> OperationRow:
        """The row of the table."""
        ...

    @property
    def operands(self) -> Sequence[Operand]:
        """The values that it takes."""
        ...

    @property
    def results(self) -> Sequence[Operand]:
        """The values that it defines."""
        ...

    @property
    def result(self) -> Operand:
        """The only result."""
        ...

    @property
    def attrs(self) -> Attrs:
        """Its attributes, complete."""
        ...

    @property
    def body(self) -> Region | None:
        """The graph that it repeats, or None."""
        ...
