"""The rewrite: caches where keys meet queries, inputs for what an encoder makes, and positions."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from moecc.errors import InputError, Problem
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.replace import infer_again
from moecc.ir.table.slots import operands_by_word
from moecc.rewrite import P, fits
from moecc.types.dtypes import I32
from moecc.types.tensor import Axis, TensorType
from moecc_passes.decode.sides import Kind, Sides
from moecc_passes.specialize.undo import reassign_slots

POSITIONS, KEY_POSITIONS, START = "positions", "key_positions", "start"
CACHE, MEMORY = "cache", "memory"

CAPACITY = "C"
"""The size of a cache."""

BOUNDED = P.assign_slots(P.any(), ..., slots="capacity")


@dataclass
class Rewriter:
    """Turns a graph whose tokens see none after them into one that takes them as they come.

    Attributes:
      sides: what is known of its values.
      origin: the origin of new nodes.
      caches: the inputs that hold keys and values of earlier tokens, by the value that they extend.
    """

    sides: Sides
    origin: str
    caches: dict[Value, Value] = field(default_factory=dict)
    memories: dict[Value, Value] = field(default_factory=dict)
    touched: list[Node] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.sides.graph

    @cached_property
    def _normalised(self) -> set[str]:
        """The axes of attention weights."""
        return {name for node in self.graph if node.op.is_distribution for name in node.mixes}

    def problems(self) -> Iterator[Problem]:
        """Yield the names that the graph has given to inputs already."""
        for name in (POSITIONS, KEY_POSITIONS, START):
            if name in self.graph.inputs:
                found = f"the input {name}"
                yield Problem("the graph decodes already, or is packed", found=found)

    def keep(self, outputs: dict[str, Value]) -> None:
        """Make `outputs` the only ones."""
        for name, value in outputs.items():
            self.graph.set_output(name, value)
        for name in [n for n in self.graph.output_names if n not in outputs]:
            self.graph.drop_output(name)

    def encoded(self) -> dict[str, Value]:
        """Return by name what tokens read of what an encoder makes."""
        found: dict[Value, str] = {}
        for node in self.graph:
            for _, value in self.sides.encoded(node):
                if value not in found:
                    found[value] = self._name(MEMORY, node, value, found.values())
        return {name: value for value, name in found.items()}

    def decode(self) -> None:
        """Rewrite the graph."""
        encoded = {value: name for name, value in self.encoded().items()}
        cached: dict[Value, Value] = {}
        for node in list(self.graph):
            meets = list(self.sides.met(node))
            for number, value in self.sides.encoded(node):
                self._replace(node, number, self._memory(value, encoded[value]))
            for number, value in meets:
                if self.sides.kinds[value] is Kind.DATA:
                    if value not in cached:
                        cached[value] = self._extended(node, value)
                    self._replace(node, number, cached[value])
                else:
                    self._replace(node, number, self._key_positions(value))
        self._take_positions()
        infer_again(self.graph, self.touched)
        for made in cached.values():
            update = made.node
            assert update is not None, "an update of a cache"
            self.graph.set_output(update.operands[0].name, made)

    def unbound(self) -> list[str]:
        """Give every choice a slot, and return where a capacity bounded them before."""
        bounded = [node for node in self.graph if fits(BOUNDED, node) is not None]
        found = []
        for node in bounded:
            given = operands_by_word(node.operands, node.attrs)
            kept = {w: v for w, v in given.items() if w != "priority"}
            found.append(node.loc)
            attrs = {"slots": "ragged", "groups": 1, "group_size": 0, "capacity_factor": 0.0}
            reassign_slots(node, kept, attrs)
        return found

    def _replace(self, node: Node, number: int, value: Value) -> None:
        node.set_operand(number, value)
        self.touched.append(node)

    def _extended(self, node: Node, value: Value) -> Value:
        """Return the keys or values of all tokens: those of a cache, and then `value`."""
        (axis,) = self.sides.keys[value]
        name = self._name(CACHE, node, value, self.graph.inputs)
        cache = self._input(name, _cached(value.type, axis, CAPACITY))
        self.caches[value] = cache
        builder = Builder(self.graph, loc=node.loc, origin=self.origin, before=node)
        start = self._input(START, TensorType(I32, ()))
        return builder.update_slice(cache, value, start, axis=axis, name=name.rsplit(".", 1)[-1])

    def _memory(self, value: Value, name: str) -> Value:
        self.memories[value] = self._input(name, TensorType(value.type.dtype, value.type.axes))
        return self.memories[value]

    def _key_positions(self, value: Value) -> Value:
        """Return the positions of the tokens in the caches, ``[batch, kv_seq]``."""
        (axis,) = self.sides.keys[value]
        taken = {v.type.names[-1]: n for n, v in self.graph.inputs.items() if KEY_POSITIONS in n}
        name = taken.get(axis) or (KEY_POSITIONS if not taken else f"{KEY_POSITIONS}.{axis}")
        return self._input(name, self._of_tokens(Axis(axis, CAPACITY)))

    def _take_positions(self) -> None:
        """Read the positions of tokens from an input, in place of counting from 0."""
        for node in list(self.graph):
            if self.sides.kinds.get(node.results[0]) and self.sides.is_positions(node.results[0]):
                given = self._input(POSITIONS, self._of_tokens(self.sides.tokens.type.axes[-1]))
                self.touched += node.result.users
                node.replace_by(given)

    def _of_tokens(self, axis: Axis) -> TensorType:
        batch = self.sides.tokens.type.axes[:-1]
        return TensorType(I32, (*batch, axis))

    def _input(self, name: str, type: TensorType) -> Value:
        """Return an input, which is added if it is missing."""
        if name in self.graph.inputs:
            return self.graph.inputs[name]
        if name in self.graph:
            self.graph.rename(self.graph.value(name), self.graph.fresh(name))
        return self.graph.input(name, type)

    def _name(self, what: str, node: Node, value: Value, taken: Container[str]) -> str:
        """Return the name of a cache: of keys where scores are made, of values where they weigh."""
        is_mask = value.type.dtype.kind == "bool"
        is_weighed = self._normalised & set(node.mixes) & set(value.type.names)
        part = "mask" if is_mask else "values" if is_weighed else "keys"
        name = f"{what}.{node.loc}.{part}" if node.loc else f"{what}.{part}"
        number, found = 1, name
        while found in taken:
            number += 1
            found = f"{name}{number}"
        return found


def _cached(type: TensorType, axis: str, size: str) -> TensorType:
    """Return the type of a cache: tokens next to the innermost axis, as products read them."""
    axes = [a for a in type.axes if a.name != axis]
    return TensorType(type.dtype, (*axes[:-1], Axis(axis, size), *axes[-1:]))


def check_sizes(graph: Graph) -> None:
    """Raise InputError if a size of `graph` has the name that caches have."""
    values = [*graph.inputs.values(), *(v for node in graph for v in node.results)]
    if any(axis.size == CAPACITY for v in values for axis in v.type.axes):
        raise InputError(f"{CAPACITY} is a size of the graph", hint="caches have the size C")
