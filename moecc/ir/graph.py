"""Graphs: values, nodes in topological order, named inputs, parameters and outputs.

A graph is in SSA form: each value is defined once, by an input, a parameter or a node, and knows
its users.  Nodes form a linked list, so that a rewrite inserts and erases in constant time and a
pass over 50,000 nodes stays linear.  Outputs are the operands of one terminator node, so that
"used as an output" is a use like any other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.operand import Region
from moecc.ir.operation import Attrs, OpDef, op
from moecc.support.text import brief, facts_table
from moecc.support.untyped import Json, JsonDict
from moecc.types import Extent, TensorType, check_printable

if TYPE_CHECKING:
    from moecc.weights.expr import Expr


SHOWN_OPERATIONS = 12
"""How many kinds of operations a notebook's table names."""

# A name may hold ranges: %layers.{0..29}.weight stands for thirty parameters.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:\{[0-9.]+\}[A-Za-z0-9_.\-]*)*\Z")

RETURN = OpDef("return", "Mark the outputs of a graph.", (), lambda _o, _a: (), variadic=True)
"""The terminator: not in the table, never printed; its operands are the outputs."""


class Value:
    """A tensor in a graph.

    Attributes:
      name: unique in its graph; printed with ``%``.
      type: its `TensorType`.
      node: the node that defines it, or None for an input or a parameter.
      users: how many operand slots of each node it fills, the terminator included.
      weight: for a parameter, the expression that makes it.
      loc: for a parameter, its location in the model.
    """

    __slots__ = ("graph", "index", "is_param", "loc", "name", "node", "type", "users", "weight")

    def __init__(
        self,
        graph: Graph,
        name: str,
        type: TensorType,
        *,
        node: Node | None = None,
        index: int = 0,
        is_param: bool = False,
        weight: Expr | None = None,
        loc: str = "",
    ) -> None:
        self.graph, self.name, self.type = graph, name, type
        self.node, self.index = node, index
        self.users: dict[Node, int] = {}
        self.is_param, self.weight, self.loc = is_param, weight, loc

    def __repr__(self) -> str:
        return f"%{self.name} : {self.type}"

    @property
    def is_output(self) -> bool:
        """Whether the graph returns this value."""
        return self.graph.terminator in self.users

    @property
    def only_user(self) -> Node | None:
        """The one node that uses this value, in one operand, or None."""
        if len(self.users) != 1:
            return None
        node, count = next(iter(self.users.items()))
        return node if count == 1 and node is not self.graph.terminator else None

    def replace_by(self, replacement: Value) -> None:
        """Replace all uses of this value, outputs included, by `replacement`."""
        if replacement is self:
            return
        for node in list(self.users):
            node.replace_operand(self, replacement)


def setter_of(extent: Extent) -> Value:
    """Return the value that sets `extent`, typed as a value of a graph."""
    assert isinstance(extent.value, Value)
    return extent.value


class Node:
    """An operation applied to operands.

    Attributes:
      op: its entry in the operation table.
      operands: the values it takes.
      attrs: its attributes, complete.
      results: the values it defines.
      loc: the location in the model, ``layers.3.ffn``.
      origin: the pass and rewrite that made it, ``upcycle/lift``; empty for an imported node.
      alive: whether it is still in its graph.
    """

    __slots__ = (
        "_next",
        "_prev",
        "alive",
        "attrs",
        "graph",
        "loc",
        "op",
        "operands",
        "origin",
        "results",
    )

    def __init__(
        self, graph: Graph, entry: OpDef, operands: Sequence[Value], attrs: dict[str, object]
    ) -> None:
        self.graph = graph
        self.op = entry
        self.operands = list(operands)
        self.attrs = attrs
        self.results: tuple[Value, ...] = ()
        self.loc = ""
        self.origin = ""
        self.alive = True
        self._prev: Node = self
        self._next: Node = self
        for operand in self.operands:
            operand.users[self] = operand.users.get(self, 0) + 1

    def __repr__(self) -> str:
        names = ", ".join(f"%{v.name}" for v in self.operands)
        return f"{self.op.name}({names}) @{self.loc}"

    @property
    def result(self) -> Value:
        """The only result.

        Raises:
          ValueError: the node has more than one result.
        """
        (value,) = self.results
        return value

    @property
    def mixes(self) -> tuple[str, ...]:
        """The axes of its operands that this node mixes."""
        return self.op.mixes(self.operands, self.attrs)

    @property
    def body(self) -> Graph | None:
        """The graph that a ``scan`` repeats; None for every other operation."""
        body = self.attrs.get("body")  # most have none; an abstract class is slow to ask
        return body if body is not None and isinstance(body, Graph) else None

    @property
    def is_dead(self) -> bool:
        """Whether nothing uses any of its results."""
        return not any(v.users for v in self.results)

    def set_operand(self, index: int, value: Value) -> None:
        """Replace operand `index` by `value`, keeping the use lists consistent."""
        old = self.operands[index]
        if old is value:
            return
        _drop_use(old, self)
        self.operands[index] = value
        value.users[self] = value.users.get(self, 0) + 1

    def replace_operand(self, old: Value, new: Value) -> None:
        """Replace `old` by `new` wherever it is an operand."""
        for index, operand in enumerate(self.operands):
            if operand is old:
                self.set_operand(index, new)

    def replace_by(self, *values: Value) -> None:
        """Replace all uses of the results, in order, by `values`, and erase this node."""
        for old, new in zip(self.results, values, strict=True):
            old.replace_by(new)
        self.erase()

    def erase(self) -> None:
        """Remove this node from its graph.

        Raises:
          ValueError: a result still has users, or the node is erased already.
        """
        if not self.alive:
            raise ValueError(f"{self!r} was erased before")
        if not self.is_dead:
            raise ValueError(f"{self!r} still has users")
        for operand in self.operands:
            _drop_use(operand, self)
        self.operands = []
        for value in self.results:
            self.graph._names.pop(value.name, None)
        self._prev._next, self._next._prev = self._next, self._prev
        self.alive = False
        self.graph.node_count -= 1

    def move_before(self, successor: Node) -> None:
        """Take this node out of the list and put it before `successor`."""
        self._prev._next, self._next._prev = self._next, self._prev
        _link(self, successor)


def _drop_use(value: Value, node: Node) -> None:
    left = value.users[node] - 1
    if left:
        value.users[node] = left
    else:
        del value.users[node]


def _link(node: Node, before: Node) -> None:
    node._prev, node._next = before._prev, before
    before._prev._next = node
    before._prev = node


class Graph(Region):
    """A model: inputs, parameters, nodes in topological order, named outputs, attributes.

    Attributes:
      name: an identifier.
      attrs: JSON values: the family, its config, the checkpoint the weights come from.
      inputs: the inputs by name, in order.
      params: the parameters by name, in order.
      output_names: the names of the outputs, in the order of the terminator's operands.
      node_count: the number of nodes.
    """

    def __init__(self, name: str = "model", attrs: Json | None = None) -> None:
        self.name = name
        self.attrs: JsonDict = dict(attrs or {})
        self.inputs: dict[str, Value] = {}
        self.params: dict[str, Value] = {}
        self.output_names: list[str] = []
        self.node_count = 0
        self._names: dict[str, Value] = {}
        self._hints: dict[str, int] = {}
        # The terminator is also the sentinel of the circular list of nodes.
        self.terminator = Node(self, RETURN, (), {})

    def __repr__(self) -> str:
        nodes = sum(1 for _ in self.every_node())
        rows = [
            ("", self.name), ("nodes", f"{nodes:,}"), ("parameters", f"{len(self.params):,}"),
            ("inputs", " ".join(self.inputs)), ("outputs", " ".join(self.outputs)),
        ]  # fmt: skip
        return brief("moecc.Graph", rows)

    def _repr_html_(self) -> str:
        counts = Counter(node.op.name for node in self.every_node())
        most = [f"{name} × {count}" for name, count in counts.most_common(SHOWN_OPERATIONS)]
        more = len(counts) - len(most)
        return facts_table(
            [
                ("graph", self.name),
                *((f"input {name}", str(value.type)) for name, value in self.inputs.items()),
                *((f"output {name}", str(value.type)) for name, value in self.outputs.items()),
                ("parameters", f"{len(self.params):,}"),
                ("nodes", f"{counts.total():,}"),
                ("operations", ", ".join([*most, *([f"and {more} more"] if more > 0 else [])])),
            ]
        )

    @property
    def family(self) -> str:
        """The family that the graph was imported from, or empty."""
        return str(self.attrs.get("family", ""))

    @property
    def stated_config(self) -> Json:
        """The config that the graph was imported from, as JSON; empty if it states none."""
        config = self.attrs.get("config")
        return config if isinstance(config, Mapping) else {}

    @property
    def weights(self) -> dict[str, Expr]:
        """The expressions of the parameters that have one, by the names of these."""
        return {n: p.weight for n, p in self.params.items() if p.weight is not None}

    def __len__(self) -> int:
        return self.node_count

    def __iter__(self) -> Iterator[Node]:
        return self.walk()

    def walk(self, start: Node | None = None) -> Iterator[Node]:
        """Yield the nodes in order; nodes may be erased and inserted meanwhile."""
        node = start if start is not None else self.terminator._next
        while node is not self.terminator:
            following = node._next
            yield node
            # An erased node keeps its link, which leads to the nodes that remain.
            while not following.alive:
                following = following._next
            node = following

    def walk_back(self) -> Iterator[Node]:
        """Yield the nodes from last to first; nodes may be erased meanwhile."""
        node = self.terminator._prev
        while node is not self.terminator:
            before = node._prev
            yield node
            while not before.alive:
                before = before._prev
            node = before

    @property
    def outputs(self) -> dict[str, Value]:
        """The outputs by name."""
        return dict(zip(self.output_names, self.terminator.operands, strict=True))

    def value(self, name: str) -> Value:
        """Return the value called `name`.

        Raises:
          KeyError: there is none.
        """
        return self._names[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def fresh(self, hint: str) -> str:
        """Return an unused name: `hint`, or `hint` with a number."""
        if hint not in self._names:
            return hint
        base = hint.rstrip("0123456789") or hint
        number = self._hints.get(base, 1)
        while f"{base}{number}" in self._names:
            number += 1
        self._hints[base] = number + 1
        return f"{base}{number}"

    def _define(self, value: Value) -> Value:
        if value.name in self._names:
            raise InputError(f"%{value.name} is defined twice", hint="give each value its own name")
        if not _NAME.match(value.name):
            raise InputError(f"{value.name!r} is not a valid name of a value")
        self._names[value.name] = value
        return value

    def input(self, name: str, type: TensorType) -> Value:
        """Add an input.

        Raises:
          InputError: the name is taken, or the name or type cannot be printed.
        """
        check_printable(name, type)
        self.inputs[name] = self._define(Value(self, name, type))
        return self.inputs[name]

    def param(
        self, name: str, type: TensorType, weight: Expr | None = None, *, loc: str = ""
    ) -> Value:
        """Add a parameter, made by `weight`.

        Raises:
          InputError: the name is taken, or the name or type cannot be printed.
        """
        check_printable(name, type)
        value = Value(self, name, type, is_param=True, weight=weight, loc=loc)
        self.params[name] = self._define(value)
        return value

    def erase_dead(self, origin: str = "") -> int:
        """Erase the nodes that nothing uses, users before their operands; return their number.

        Nodes stay whose origin does not begin with `origin`.
        """
        count = 0
        for node in self.walk_back():
            if node.is_dead and node.origin.startswith(origin):
                node.erase()
                count += 1
        return count

    def erase_unused_params(self) -> int:
        """Erase the parameters that nothing uses; return their number."""
        unused = [name for name, value in self.params.items() if not value.users]
        for name in unused:
            self.erase_param(name)
        return len(unused)

    def erase_param(self, name: str) -> None:
        """Remove a parameter that nothing uses. Raises ValueError if something does."""
        self._erase(self.params, name)

    def order_params(self, values: Iterable[Value]) -> None:
        """Put the parameters into the order of `values`.

        Raises:
          ValueError: `values` are not the parameters, each once.
        """
        ordered = {v.name: v for v in values}
        if ordered.keys() != self.params.keys():
            raise ValueError("the order must contain every parameter once")
        self.params.clear()
        self.params.update(ordered)

    def every_node(self) -> Iterator[Node]:
        """Yield the nodes in order, each followed by the nodes of its body."""
        for node in self:
            yield node
            if node.body is not None:
                yield from node.body

    def erase_input(self, name: str) -> None:
        """Remove an input that nothing uses. Raises ValueError if something does."""
        self._erase(self.inputs, name)

    def _erase(self, values: dict[str, Value], name: str) -> None:
        if values[name].users:
            raise ValueError(f"%{name} still has users")
        del values[name], self._names[name]

    def rename(self, value: Value, name: str) -> None:
        """Give `value` another name; a parameter goes to the end of the parameters.

        Raises:
          InputError: the name is taken.
        """
        old = value.name
        if old == name:
            return
        value.name = name
        try:
            self._define(value)
        except InputError:
            value.name = old
            raise
        del self._names[old]
        if self.params.get(old) is value:
            # Keeping its position would cost a pass over all parameters for each renaming.
            del self.params[old]
            self.params[name] = value
        elif self.inputs.get(old) is value:
            items = [(name if v is value else k, v) for k, v in self.inputs.items()]
            self.inputs.clear()
            self.inputs.update(items)

    def append(
        self,
        entry: OpDef | str,
        operands: Iterable[Value],
        attrs: Attrs | None = None,
        *,
        names: Sequence[str] = (),
        loc: str = "",
        origin: str = "",
        before: Node | None = None,
    ) -> Node:
        """Add a node at the end, or before `before`, with inferred result types.

        Args:
          entry: the operation or its name.
          operands: values of this graph.
          attrs: attributes; missing ones take their defaults.
          names: hints for the names of the results.
          loc: the location in the model.
          origin: the pass and rewrite that create it.
          before: the node to insert in front of.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        entry = op(entry) if isinstance(entry, str) else entry
        operands = list(operands)
        entry.check_arity(len(operands))
        full = entry.complete(attrs or {})
        types = entry.result_types(operands, full)
        node = Node(self, entry, operands, full)
        node.loc, node.origin = loc, origin
        hints = names or entry.results
        node.results = tuple(
            self._define(
                Value(self, self.fresh(hints[min(i, len(hints) - 1)]), t, node=node, index=i)
            )
            for i, t in enumerate(types)
        )
        _link(node, before or self.terminator)
        self.node_count += 1
        return node

    def copy(
        self,
        node: Node,
        image: dict[Value, Value],
        attrs: Attrs | None = None,
        *,
        names: Sequence[str] = (),
        loc: str | None = None,
        origin: str | None = None,
        before: Node | None = None,
    ) -> Node:
        """Add `node`, which may be another graph's, again, and map its results to the new ones.

        Args:
          node: the node.
          image: values of this graph by those that they stand for; an operand without one stays.
          attrs: the attributes in place of the node's, whose body would be shared.
          names: hints for the names of the results, in place of those of the node's.
          loc: the location in place of the node's.
          origin: the origin in place of the node's.
          before: the node to insert in front of.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        copy = self.append(
            node.op,
            [image.get(v, v) for v in node.operands],
            node.attrs if attrs is None else attrs,
            names=names or [v.name for v in node.results],
            loc=node.loc if loc is None else loc,
            origin=node.origin if origin is None else origin,
            before=before,
        )
        image.update(zip(node.results, copy.results, strict=True))
        return copy

    def set_output(self, name: str, value: Value) -> None:
        """Make `value` the output `name`, replacing the previous output of that name."""
        if name in self.output_names:
            self.terminator.set_operand(self.output_names.index(name), value)
            return
        self.output_names.append(name)
        self.terminator.operands.append(value)
        value.users[self.terminator] = value.users.get(self.terminator, 0) + 1

    def drop_output(self, name: str) -> None:
        """Remove the output `name`."""
        at = self.output_names.index(name)
        _drop_use(self.terminator.operands[at], self.terminator)
        del self.output_names[at], self.terminator.operands[at]


def where(node: Node) -> str:
    """Return a node's description in messages: its first result, operation and location."""
    name = f"%{node.results[0].name} = " if node.results else ""
    loc = f" @{node.loc}" if node.loc else ""
    origin = f" by {node.origin}" if node.origin else ""
    return f"{name}{node.op.name}{loc}{origin}"
