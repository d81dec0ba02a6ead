"""Whatever is done to a graph through its interface, it stays valid and its use lists symmetric."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moecc.ir import (
    F32,
    Axis,
    Graph,
    Node,
    TensorType,
    Value,
    clone,
    equal,
    parse,
    print_graph,
    verify,
)
from moecc.testing import assert_same
from moecc.testing.growth import Growth
from moecc.testing.steps import SIMPLE

INDEX = st.integers(0, 255)


class Drawn:
    """Decisions of a growth, drawn while a rule runs; the simplest before."""

    def __init__(self) -> None:
        self.data: st.DataObject | None = None

    def below(self, count: int) -> int:
        return self.data.draw(INDEX) % count if self.data is not None else 0


class GraphMachine(RuleBasedStateMachine):
    """A graph that is grown, rewired, cut, renamed, copied and read back."""

    def __init__(self) -> None:
        super().__init__()
        self.choices = Drawn()
        self.growth = Growth(self.choices, F32)
        x = self.growth.input(
            "x", TensorType(F32, (Axis("batch", "B"), Axis("seq", "S"), Axis("embed", 2)))
        )
        self.graph.set_output("x", x)

    @property
    def graph(self) -> Graph:
        return self.growth.graph

    def adopt(self, graph: Graph) -> None:
        """Go on with another graph that has the same names."""
        names = [v.name for v in self.growth.values]
        self.growth = Growth(self.choices, F32)
        self.growth.graph = self.growth.builder.graph = graph
        self.growth.values = [graph.value(n) for n in names]

    def forget_erased(self) -> None:
        graph = self.graph
        self.growth.values = [
            v for v in self.growth.values if v.name in graph and graph.value(v.name) is v
        ]

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        self.choices.data = data
        self.growth.relocate()
        self.growth.pick(SIMPLE)(self.growth)

    @rule(at=INDEX, name=st.sampled_from(["y", "z"]))
    def set_output(self, at: int, name: str) -> None:
        self.graph.set_output(name, self.growth.values[at % len(self.growth.values)])

    @precondition(lambda self: len(self.graph.output_names) > 1)
    @rule(at=INDEX)
    def drop_output(self, at: int) -> None:
        names = self.graph.output_names
        self.graph.drop_output(names[at % len(names)])

    @rule(at=INDEX, instead=INDEX)
    def replace_uses(self, at: int, instead: int) -> None:
        values = self.growth.values
        old = values[at % len(values)]
        fits = [v for v in values if v.type == old.type and self.before_users(v, old)]
        if fits:
            new = fits[instead % len(fits)]
            old.replace_by(new)
            assert new is old or not old.users

    def before_users(self, new: Value, old: Value) -> bool:
        """Return whether `new` is defined before every user of `old`."""
        if new.node is None:
            return True
        order = list(self.graph)
        users = [order.index(u) for u in old.users if u is not self.graph.terminator]
        return order.index(new.node) < min(users, default=len(order))

    @rule(at=INDEX)
    def replace_a_node_by_a_copy(self, at: int) -> None:
        nodes = list(self.graph)
        if not nodes:
            return
        node = nodes[at % len(nodes)]
        made = self.graph.append(node.op, node.operands, node.attrs, before=node, loc=node.loc)
        node.replace_by(*made.results)
        assert not node.alive
        self.growth.values += made.results
        self.forget_erased()

    @rule()
    def erase_the_dead(self) -> None:
        for node in self.graph.walk_back():
            if node.is_dead:
                node.erase()
        for name in [n for n, p in self.graph.params.items() if not p.users]:
            self.graph.erase_param(name)
        for name in [n for n, x in self.graph.inputs.items() if not x.users and n != "x"]:
            self.graph.erase_input(name)
        self.forget_erased()
        assert not any(n.is_dead for n in self.graph)

    @rule()
    def erase_ahead_while_walking(self) -> None:
        for node in self.graph:
            assert node.alive
            # In order: whether a user is dead may depend on what was erased before it.
            for user in dict.fromkeys(u for v in node.results for u in v.users):
                if user is not self.graph.terminator and user.is_dead:
                    user.erase()
        self.forget_erased()

    @rule()
    def insert_while_walking(self) -> None:
        seen = list(self.graph)
        met = []
        for node in self.graph:
            met.append(node)
            if node.op.name == "relu":
                self.growth.values += self.graph.append("tanh", node.operands, before=node).results
        assert met == seen

    @rule(at=INDEX, name=st.sampled_from(["a", "b.1", "v", "7"]))
    def rename(self, at: int, name: str) -> None:
        value = self.growth.values[at % len(self.growth.values)]
        if name not in self.graph:
            self.graph.rename(value, name)
            assert self.graph.value(name) is value

    @rule()
    def copy(self) -> None:
        copied = clone(self.graph)
        assert equal(copied, self.graph)
        assert_same(self.graph, copied, exact=True)
        self.adopt(copied)

    @rule()
    def read_back(self) -> None:
        again = parse(print_graph(self.graph))
        assert equal(again, self.graph)
        self.adopt(again)

    @invariant()
    def is_valid(self) -> None:
        verify(self.graph)

    @invariant()
    def use_lists_are_symmetric(self) -> None:
        graph = self.graph
        uses: dict[Value, Counter[Node]] = {}
        nodes = list(graph)
        for node in [*nodes, graph.terminator]:
            for operand in node.operands:
                uses.setdefault(operand, Counter())[node] += 1
        values = [*graph.inputs.values(), *graph.params.values()]
        values += [v for n in nodes for v in n.results]
        for value in values:
            assert value.users == uses.pop(value, {})
        assert not uses
        assert len(nodes) == len(graph)
        assert list(graph.walk_back()) == nodes[::-1]


TestGraph = GraphMachine.TestCase
TestGraph.settings = settings(max_examples=60, stateful_step_count=25)
