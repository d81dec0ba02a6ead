"""Random graphs: steps and blocks in random order, then what no output needs is removed.

Random operations alone seldom make what a pattern needs, and a law of a pass that never matches
proves nothing.  A pattern is written as the operations that it matches, so it can be planted, too:
from its leaves to its root, with guesses where it leaves something open.  What no guess makes (rows
in slots, rotary tables) is copied from a random block that has it.  The matcher and the rule's
check judge what was made; what does not match is thrown away.

A graph is sharded at random in any way that its types allow: inputs and parameters along random
axes, values resharded at random, and gathered where an operation cannot take them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh, set_mesh, sharding_problems
from moecc.ir.operation import Attr, OpDef
from moecc.ir.ops.slots import experts_of, is_slots
from moecc.ir.structure import copied
from moecc.ir.unroll import unrolled
from moecc.rewrite.pattern import (
    AttrPattern,
    LeafPattern,
    OneOf,
    OpPattern,
    Pattern,
    Rule,
    accept,
    match,
    roots,
)
from moecc.testing.growth import (
    Growth,
    Step,
    T,
    attribute,
    named_axes,
    operand_type,
    operands_of,
    stream_type,
)
from moecc.testing.steps import BLOCKS, SIMPLE
from moecc.testing.weights import Choices, Decisions, chance, grow_weight
from moecc.types import BF16, F32, F64, Axis, TensorType, is_name

MAX_STEPS = 8
"""The most steps of a graph; a step is an operation or a block."""


def random_graph(
    seed: int,
    *,
    steps: Sequence[Step] | None = None,
    max_steps: int = MAX_STEPS,
    dead: bool = False,
    like: Example | Sequence[Example] = (),
) -> Graph:
    """Return a well-typed graph whose outputs depend on everything in it.

    Args:
      seed: chooses the graph.
      steps: what may be appended, from simple to complex; a step is a function of a `Growth`.
        None means operations, and in a third of the cases a whole block.
      max_steps: the most steps.
      dead: whether nodes that no output needs stay.
      like: rules, patterns or graphs, one or several; what one of them matches is planted among
        the steps.
    """
    examples = tuple(like) if isinstance(like, Sequence) else (like,)
    choices = Decisions(seed)
    growth = Growth(choices, (F32, F32, BF16, F64)[choices.below(4)])
    growth.input("x", TensorType(growth.dtype, (*growth.tokens, growth.embed)))
    count = 1 + choices.below(max_steps)
    at = choices.below(count) if examples else -1
    for number in range(count):
        growth.relocate()
        if number == at:
            plant(growth, growth.pick(examples))
            continue
        kinds = steps or (BLOCKS if growth.chance(35) else SIMPLE)
        since = len(growth.values)
        growth.pick(kinds)(growth)
        growth.tap(since, 20)
    _return_sinks(growth)
    if not dead:
        remove_dead(growth.graph)
    return growth.graph


def _return_sinks(growth: Growth) -> None:
    """Return one to three of the values that nothing uses, and what was tapped."""
    graph = growth.graph
    sinks = [v for v in growth.values if v.node is not None and not v.users]
    sinks = sinks or [growth.values[-1]]
    count = 1 + growth.choices.below(min(3, len(sinks)))
    first = growth.choices.below(len(sinks))
    returned: list[Value] = [*(sinks[(first + i) % len(sinks)] for i in range(count)), *growth.taps]
    for number, value in enumerate(dict.fromkeys(returned)):
        graph.set_output(f"y{number}", value)


def remove_dead(graph: Graph) -> None:
    """Remove the nodes, parameters and inputs that no output needs."""
    graph.erase_dead()
    graph.erase_unused_params()
    for name in [n for n, v in graph.inputs.items() if not v.users]:
        graph.erase_input(name)


def keep_only(graph: Graph, keep: Callable[[int], bool]) -> None:
    """Cut nodes out of `graph`: what they took is returned, what they gave becomes an input.

    So a graph shrinks from all sides to the few nodes that matter.  Rows in slots cannot be an
    input: an operand of the same type stands in; without one the node stays.

    Args:
      graph: is changed in place.
      keep: whether the node of a position stays.
    """
    cut = [node for position, node in enumerate(graph) if not keep(position)]
    for node in reversed(cut):
        _cut(graph, node)
    if not cut:
        return
    results = {n: v for n, v in graph.outputs.items() if v.node is not None}
    for name in graph.outputs.keys() - results.keys() if results else ():
        graph.drop_output(name)
    remove_dead(graph)


def _cut(graph: Graph, node: Node) -> None:
    used = [v for v in node.results if v.users.keys() - {graph.terminator}]
    stand_ins = {v: _stand_in(v) for v in used}
    operands = list(dict.fromkeys(node.operands))
    if None in stand_ins.values() or not (operands or graph.inputs):
        return
    for name in [n for n, v in graph.outputs.items() if v in node.results]:
        graph.drop_output(name)
    for value, stand_in in stand_ins.items():
        name = graph.fresh(f"{value.name}_in")
        value.replace_by(stand_in if isinstance(stand_in, Value) else graph.input(name, value.type))
    node.erase()
    for operand in operands:
        if not operand.users and operand.node is not None:
            graph.set_output(_free_output(graph), operand)
    if not graph.output_names:
        graph.set_output("y0", next(iter([*operands, *graph.inputs.values()])))


def _stand_in(value: Value) -> Value | str | None:
    """Return what `value` may be exchanged for: an operand, ``"input"``, or None for nothing."""
    assert value.node is not None
    if is_slots(value):
        return None
    if not value.type.extents:
        return "input"
    return next((v for v in value.node.operands if v.type == value.type), None)


def _free_output(graph: Graph) -> str:
    number = 0
    while f"y{number}" in graph.output_names:
        number += 1
    return f"y{number}"


# Making what a pattern matches, from its leaves to its root.
#
# Where the pattern leaves something open (the type of an operand, an attribute), it is guessed, and
# `infer` decides whether it fits.  Operations whose operands cannot be guessed, as rows in slots
# and rotary tables, are made after a model: a random step that has one.

BUILDS = 6
"""How often the operands of one operation are made anew."""

GUESSES = 40
"""How often the open operands and attributes of one operation are guessed."""


class Misfit(Exception):
    """What was guessed does not fit together."""


class Mark:
    """A point in the growth of a graph to which it can be taken back."""

    def __init__(self, g: Growth) -> None:
        self.g = g
        self.last = next(g.graph.walk_back(), None)
        self.values = len(g.values)
        self.taps = len(g.taps)
        self.known = set(g.graph.params) | set(g.graph.inputs)

    def since(self) -> list[Node]:
        """Return the nodes that were appended since then, in order."""
        nodes = []
        for node in self.g.graph.walk_back():
            if node is self.last:
                break
            nodes.append(node)
        return nodes[::-1]

    def without_waste(self, root: Value) -> list[Node]:
        """Return the nodes that were appended since then, and erase guesses that led nowhere."""
        usable = set(self.g.values)
        for node in self.since()[::-1]:
            if node.is_dead and node is not root.node and not usable & set(node.results):
                node.erase()
        return self.since()

    def restore(self) -> None:
        """Remove what was appended since then."""
        for node in self.since()[::-1]:
            node.erase()
        graph = self.g.graph
        for name in [n for n, v in graph.params.items() if n not in self.known and not v.users]:
            graph.erase_param(name)
        for name in [n for n, v in graph.inputs.items() if n not in self.known and not v.users]:
            graph.erase_input(name)
        del self.g.values[self.values :], self.g.taps[self.taps :]


class PatternMaker:
    """Makes what one pattern matches.

    Attributes:
      bound: what the names of the pattern stand for so far.
      names: the axes that the pattern names.
    """

    def __init__(self, g: Growth, names: Sequence[str]) -> None:
        self.g = g
        self.names = names
        self.bound: dict[str, object] = {}

    def build(self, pattern: Pattern, near: Value | None, goal: TensorType | None = None) -> Value:
        """Return a value that `pattern` matches.

        Args:
          pattern: the pattern.
          near: a value that it may be made of.
          goal: the type that the value had better have.

        Raises:
          Misfit: nothing that was tried fits.
        """
        if isinstance(pattern, OneOf):
            return self.build(self.g.pick(pattern.choices), near, goal)
        if isinstance(pattern, LeafPattern):
            return self.leaf(pattern, near, goal)
        assert isinstance(pattern, OpPattern)
        entry = self.g.pick(sorted(pattern.ops, key=str))
        ways = (self.guessed, self._by_model) if _is_guessable(entry) else (self._by_model,)
        for attempt in ways:
            before = dict(self.bound)
            try:
                value = attempt(pattern, entry, near, goal)
            except Misfit:
                self.bound = before
                continue
            return value
        raise Misfit

    # --- leaves

    def leaf(self, pattern: LeafPattern, near: Value | None, goal: TensorType | None) -> Value:
        """Return what a leaf of the pattern may be: what its name stands for, near, or new."""
        bound = self.bound.get(pattern.name or "")
        if isinstance(bound, Value):
            return bound
        type = goal or stream_type(self.g, self.names)
        fits = near is not None and near.type == (goal or near.type) and _accepts(pattern, near)
        if near is not None and fits and self.g.chance(75):
            return self._bind(pattern.name, near)
        candidate = find_type(self.g, type)
        if candidate is not None and self.g.chance(50) and _accepts(pattern, candidate):
            return self._bind(pattern.name, candidate)
        return self._bind(pattern.name, self._new(pattern, type))

    def _new(self, pattern: LeafPattern, type: TensorType) -> Value:
        if type.extents:
            raise Misfit
        is_static = type.is_static and type.dtype.is_float
        is_param = pattern.kind == "param" or (pattern.kind == "value" and is_static)
        if is_param and not is_static:
            raise Misfit
        g = self.g
        for _ in range(4):
            hint = pattern.name if is_name(pattern.name) else "w"
            value = self._param(str(hint), type) if is_param else g.input("t", type)
            if _accepts(pattern, value):
                return value
        raise Misfit

    def _param(self, hint: str, type: TensorType) -> Value:
        g = self.g
        if g.chance(30):
            return g.param(hint, type.axes, type.dtype)
        # Rules about weights need expressions more often than other steps do.
        weight = grow_weight(g.choices, type)
        return g.graph.param(g.graph.fresh(hint), type, weight, loc=g.builder.loc)

    def _bind(self, name: str | None, thing: T) -> T:
        if name is not None and self.bound.setdefault(name, thing) != thing:
            raise Misfit
        return thing

    # --- operations, guessed

    def guessed(
        self, pattern: OpPattern, entry: OpDef, near: Value | None, goal: TensorType | None
    ) -> Value:
        """Return the operation on operands that are made first where the pattern describes them."""
        has_parts = any(isinstance(p, OpPattern | OneOf) for p in pattern.operands)
        for _ in range(BUILDS if has_parts else 1):
            before = dict(self.bound)
            try:
                return self._once(pattern, entry, near, goal)
            except Misfit:
                self.bound = before
        raise Misfit

    def _once(
        self, pattern: OpPattern, entry: OpDef, near: Value | None, goal: TensorType | None
    ) -> Value:
        wanted = operands_of(pattern, entry)
        results: dict[int, Value] = {}
        for at, item in enumerate(wanted):
            if isinstance(item, OpPattern | OneOf):
                beside = next(iter(results.values()), None)
                results[at] = self.build(item, near, beside.type if beside else None)
        for number in range(GUESSES):
            before = dict(self.bound)
            # Of the last guesses, any type will do.
            aim = goal if number < GUESSES // 2 else None
            try:
                return self._try(pattern, entry, self._open(wanted, results, near), aim)
            except (Misfit, InputError):
                self.bound = before
        raise Misfit

    def _open(
        self, wanted: Sequence[Pattern | None], results: dict[int, Value], near: Value | None
    ) -> list[Value]:
        """Return operands: those made, and guesses for the others."""
        operands = dict(results)
        for at, item in enumerate(wanted):
            if at in operands:
                continue
            anchor = next(iter(operands.values()), None)
            leaf = item if isinstance(item, LeafPattern) else LeafPattern()
            is_param = leaf.kind == "param"
            goal = operand_type(self.g, anchor.type, self.names, is_param) if anchor else None
            operands[at] = self.leaf(leaf, near if anchor is None else anchor, goal)
        return [operands[at] for at in range(len(wanted))]

    def _try(
        self, pattern: OpPattern, entry: OpDef, operands: list[Value], goal: TensorType | None
    ) -> Value:
        wanted = dict(pattern.attrs)
        types = [v.type for v in operands] or [TensorType(self.g.dtype)]
        types += [v.type for v in self.bound.values() if isinstance(v, Value)]
        attrs = {
            name: self._attribute(spec, wanted.get(name), types)
            for name, spec in entry.attrs.items()
        }
        if pattern.commutative and self.g.chance(40):
            operands = operands[::-1]
        node = self.g.builder.node(entry.name, *operands, names=(), **attrs)
        return self._checked(pattern, node, goal)

    def _attribute(self, spec: Attr[Any], wanted: object, types: Sequence[TensorType]) -> object:
        if wanted is not None and not isinstance(wanted, AttrPattern):
            return wanted
        name = wanted.name if wanted is not None else None
        if name is not None and name in self.bound:
            return self.bound[name]
        return self._bind(name, attribute(self.g, spec, wanted, types, self.names))

    def _checked(self, pattern: OpPattern, node: Node, goal: TensorType | None) -> Value:
        """Return the result that the pattern is about, or take the node back."""
        value = node.results[min(pattern.index, len(node.results) - 1)]
        refused = pattern.where is not None and not pattern.where(value)
        if refused or (goal is not None and value.type != goal):
            node.erase()
            raise Misfit
        return self._bind(pattern.name, value)

    # --- operations, made after a model

    def _by_model(
        self, pattern: OpPattern, entry: OpDef, near: Value | None, goal: TensorType | None
    ) -> Value:
        """Return the operation on the operands of one that a block has."""
        for model in self._models(pattern, entry, near):
            before = dict(self.bound)
            try:
                return self._after(pattern, model, goal)
            except (Misfit, InputError):
                self.bound = before
        raise Misfit

    def _models(self, pattern: OpPattern, entry: OpDef, near: Value | None) -> Iterator[Node]:
        """Yield nodes of an operation: what makes `near`, what is there, and what steps make."""
        if near is not None and near.node is not None and near.node.op is entry:
            yield near.node
        makers = steps_by_operation().get(entry.name, ())
        for _ in range(BUILDS if makers else 0):
            since = Mark(self.g)
            with suppress(InputError):
                self.g.pick(makers)(self.g)
            yield from [n for n in since.since() if n.op is entry and _has_attrs(pattern, n)]

    def _after(self, pattern: OpPattern, model: Node, goal: TensorType | None) -> Value:
        """Return a node like `model`, on operands that the pattern allows."""
        operands = [
            self.build(item, old, old.type) if item is not None else old
            for item, old in zip(_padded(pattern, model), model.operands, strict=True)
        ]
        for name, wanted in pattern.attrs:
            if isinstance(wanted, AttrPattern):
                self._bind(wanted.name, model.attrs[name])
        return self._checked(pattern, self.g.builder.clone(model, *operands), goal)


def find_type(g: Growth, type: TensorType) -> Value | None:
    """Return an earlier value of a type, if there is one."""
    return g.find(lambda v: v.type == type)


def _accepts(pattern: LeafPattern, value: Value) -> bool:
    is_input = value.node is None and not value.is_param
    of_kind = {"value": True, "param": value.is_param, "input": is_input}[pattern.kind]
    return of_kind and (pattern.where is None or bool(pattern.where(value)))


def _has_attrs(pattern: OpPattern, node: Node) -> bool:
    for name, wanted in pattern.attrs:
        have = node.attrs[name]
        where = wanted.where if isinstance(wanted, AttrPattern) else None
        fits = where is None or where(have) if isinstance(wanted, AttrPattern) else have == wanted
        if not fits:
            return False
    return True


def _padded(pattern: OpPattern, node: Node) -> list[Pattern | None]:
    return [*pattern.operands, *[None] * (len(node.operands) - len(pattern.operands))]


@cache
def _is_guessable(entry: OpDef) -> bool:
    """Return whether guesses ever make the operation; they are tried on graphs of their own."""
    pattern = OpPattern(frozenset({entry}), tuple(LeafPattern() for _ in entry.operands))
    for seed in range(4):
        g = _new_growth(seed)
        with suppress(Misfit):
            PatternMaker(g, ()).guessed(pattern, entry, g.values[0], None)
            return True
    return False


def _new_growth(seed: int) -> Growth:
    g = Growth(Decisions(seed), F32)
    g.input("x", TensorType(F32, (*g.tokens, g.embed)))
    return g


@cache
def steps_by_operation() -> dict[str, tuple[Step, ...]]:
    """Return, for each operation, the steps that now and then append it."""
    by_name: dict[str, list[Step]] = {}
    for step in (*SIMPLE, *BLOCKS):
        grown = [_new_growth(seed) for seed in range(16)]
        for g in grown * 2:
            step(g)
        for name in {n.op.name for g in grown for n in g.graph}:
            by_name.setdefault(name, []).append(step)
    return {name: tuple(steps) for name, steps in by_name.items()}


Example = Rule | Pattern | Graph
"""What can be planted: what a rule or a pattern matches, or a copy of a graph."""

PLANTINGS = 20
"""How often a pattern is made anew until it, and the rule's check, match."""


def plant(g: Growth, example: Example) -> bool:
    """Append what `example` describes, and return whether it is there as described.

    Its root is returned by the graph, or used by something that is.  One in three of the values
    inside has another user, is returned, or may be used by later steps.
    """
    if isinstance(example, Graph):
        _expose(g, list(_copied(g, example)))
        return True
    rule = example if isinstance(example, Rule) else None
    pattern = example.pattern if isinstance(example, Rule) else example
    for _ in range(PLANTINGS):
        mark = Mark(g)
        try:
            maker = PatternMaker(g, named_axes(pattern))
            root = maker.build(g.pick(roots(pattern)), g.find_float())
        except Misfit:
            mark.restore()
            continue
        assert root.node is not None
        matches = [m for p in roots(pattern) if (m := match(p, root.node)) is not None]
        if bool(matches) and (rule.check if rule else accept)(matches[0]) is None:
            planted = mark.without_waste(root)
            _expose(g, [v for n in planted for v in n.results if v is not root] + [root])
            return True
        mark.restore()
    return False


def _expose(g: Growth, values: Sequence[Value]) -> None:
    """Let later steps use the last of `values`, and at times what is inside; return the last."""
    *inner, root = values
    for value in inner:
        if g.chance(15):
            g.taps.append(value)
        elif g.chance(20):
            g.values.append(value)
    g.values.append(root)
    is_kept = not root.type.dtype.is_float or g.chance(50)
    g.taps.append(root if is_kept else g.emit("tanh", root))


def _copied(g: Growth, example: Graph) -> Iterator[Value]:
    """Append a copy of `example`, on values that are there or new, and yield its results."""
    values: dict[Value, Value] = {}
    for value in example.inputs.values():
        candidate = find_type(g, value.type)
        values[value] = candidate if candidate and g.chance(50) else g.input(value.name, value.type)
    for value in example.params.values():
        name = g.graph.fresh(value.name)
        values[value] = g.graph.param(name, value.type, value.weight, loc=value.loc)
    for node in example:
        copy = g.builder.clone(node, *(values[v] for v in node.operands))
        values.update(zip(node.results, copy.results, strict=True))
        yield from copy.results


def random_sharding(graph: Graph, choices: Choices, mesh: Mesh) -> Graph:
    """Return a copy of `graph` sharded over `mesh`, with collectives, that means the same.

    Args:
      graph: a graph on no mesh; layers that it repeats are written out.
      choices: where the decisions come from.
      mesh: the mesh; two or three devices along each axis are enough to tell axes apart.
    """
    graph = unrolled(graph)
    for _ in range(2):
        try:
            return _Sharder(graph, choices, mesh, whole_slots=False).run()
        except InputError:
            continue
    return _Sharder(graph, choices, mesh, whole_slots=True).run()


class _Sharder:
    """A graph that is copied onto a mesh.

    Attributes:
      kept: the copies of nodes, as opposed to collectives.
      whole_slots: whether choices that get slots are replicated, which suits whatever follows.
    """

    def __init__(self, graph: Graph, choices: Choices, mesh: Mesh, whole_slots: bool) -> None:
        self.graph = graph
        self.choices = choices
        self.mesh = mesh
        self.whole_slots = whole_slots
        self.copy = Graph(graph.name, dict(graph.attrs))
        set_mesh(self.copy, mesh)
        self.values: dict[Value, Value] = {}
        self.kept: set[Node] = set()

    def run(self) -> Graph:
        """Return the copy.

        Raises:
          InputError: slots and what is to be put into them are sharded differently.
        """
        for name, value in self.graph.inputs.items():
            self.values[value] = self.copy.input(name, self._laid(value.type))
        for name, value in self.graph.params.items():
            type = self._laid(value.type)
            self.values[value] = self.copy.param(name, type, value.weight, loc=value.loc)
        for node in self.graph:
            self._append(node)
        for name, value in self.graph.outputs.items():
            self.copy.set_output(name, self.values[value])
        _erase_unused(self.copy, self.kept)
        return self.copy

    def _laid(self, type: TensorType) -> TensorType:
        """Return `type`, some of its axes split over mesh axes that divide them."""
        free = list(self.mesh.names)
        axes = []
        for axis in type.axes:
            while free and chance(self.choices, 45):
                wider = (*axis.mesh, free[self.choices.below(len(free))])
                if isinstance(axis.size, int) and axis.size % self.mesh.size(wider):
                    break
                axis = Axis(axis.name, axis.size, wider)
                free.remove(wider[-1])
            axes.append(axis)
        return type.with_axes(axes)

    def _append(self, node: Node) -> None:
        """Append a copy of `node`, on operands sharded as it can take them."""
        builder = Builder(self.copy, loc=node.loc, origin=node.origin)
        slots = [v for v in node.operands if is_slots(v)]
        # Slots belong to the choices that they were assigned to, as these are sharded.
        bound = {experts_of(p): experts_of(self.values[p]) for p in slots}
        bound |= {p: self.values[p] for p in slots}
        operands = [bound.get(v) or self.values[v] for v in node.operands]
        free = [i for i, v in enumerate(node.operands) if v not in bound]
        for at in free:
            if chance(self.choices, 25):
                operands[at] = self._moved(builder, operands[at])
        if self.whole_slots and is_slots(node.results[-1]):
            operands = [_gathered(builder, v) for v in operands]
        copy = self._first_that_fits(builder, node, operands, free)
        self.kept.add(copy)
        for old, new in zip(node.results, copy.results, strict=True):
            # `value` with every sum carried out: everywhere, or scattered along an
            # axis.
            value = new
            for name in value.type.unreduced:
                along = [a for a in value.type.axes if self._divides(a, (name,))]
                if along and chance(self.choices, 50):
                    axis = along[self.choices.below(len(along))].name
                    value = builder.node("reduce_scatter", value, axis=axis, mesh=name).result
                else:
                    value = builder.node("all_reduce", value, mesh=name).result
            self.values[old] = value

    def _first_that_fits(
        self, builder: Builder, node: Node, operands: list[Value], free: list[int]
    ) -> Node:
        """Return `node` on `operands`: resharded as the first is, or else gathered."""
        attempts = [(_beside, at) for at in free if at] + [(_gathered, at) for at in free]
        for way, at in attempts:
            try:
                return self._again(node, operands)
            except InputError:
                operands[at] = way(builder, operands[at], operands[0])
        return self._again(node, operands)

    def _again(self, node: Node, operands: list[Value]) -> Node:
        names = [v.name for v in node.results]
        copy = self.copy.append(
            node.op, operands, copied(node.attrs), names=names, loc=node.loc, origin=node.origin
        )
        problems = [p for v in copy.results for p in sharding_problems(v.type, self.mesh)]
        if problems:
            copy.erase()
            raise InputError(problems)
        return copy

    def _moved(self, builder: Builder, value: Value) -> Value:
        """Return `value`, brought elsewhere by one collective if one can."""
        moves = list(self._moves(value.type))
        if not moves:
            return value
        op, attrs = moves[self.choices.below(len(moves))]
        try:
            return builder.node(op, value, names=(), **attrs).result
        except InputError:
            return value

    def _moves(self, type: TensorType) -> Iterator[tuple[str, dict[str, object]]]:
        used = {m for a in type.axes for m in a.mesh}
        for axis in type.axes:
            for name in self.mesh.names:
                size = self.mesh.size((*axis.mesh, name))
                if name not in used and isinstance(axis.size, int) and axis.size % size == 0:
                    yield "shard", {"axis": axis.name, "mesh": (name,)}
            if axis.mesh:
                last = axis.mesh[-1:]
                yield "all_gather", {"axis": axis.name, "mesh": last}
                for target in type.axes:
                    if isinstance(target.size, int) and self._divides(target, last):
                        attrs: dict[str, object] = {
                            "mesh": last,
                            "split": target.name,
                            "gather": axis.name,
                        }
                        yield "all_to_all", attrs

    def _divides(self, axis: Axis, mesh: tuple[str, ...]) -> bool:
        return isinstance(axis.size, int) and axis.size % self.mesh.size((*axis.mesh, *mesh)) == 0


def _gathered(builder: Builder, value: Value, first: Value | None = None) -> Value:
    """Return `value`, whole on every device."""
    for axis in value.type.axes:
        if axis.mesh:
            value = builder.node("all_gather", value, axis=axis.name, mesh=axis.mesh).result
    return value


def _beside(builder: Builder, value: Value, first: Value) -> Value:
    """Return `value`, its axes split as those of `first` of the same names and sizes."""
    value = _gathered(builder, value)
    for axis in first.type.axes:
        if axis.mesh and axis.name in value.type and value.type[axis.name].size == axis.size:
            value = builder.node("shard", value, axis=axis.name, mesh=axis.mesh).result
    return value


def _erase_unused(graph: Graph, roots: Collection[Node]) -> None:
    for node in graph.walk_back():
        if node.is_dead and node not in roots:
            node.erase()
