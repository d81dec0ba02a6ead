"""All blocks of a function as one graph: an input and an output for each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.structure import attributes
from moecc.model.open import GRAPH
from moecc.types import DTYPES, F32, Axis, DType, Extent, TensorType, is_name
from moecc_backends.jaxpr.blocks import OUTER
from moecc_backends.jaxpr.jaxprs import path_name, scan_sizes, unique, user_line
from moecc_backends.jaxpr.labels import Dims
from moecc_backends.jaxpr.scopes import Scope, Step, Traced, Val
from moecc_backends.jaxpr.survey import Instance, Key, Site, Survey
from moecc_backends.xla.lower.function import finalize_output, lower_values

TOKEN_AXES = {1: ("token",), 2: ("batch", "seq")}
"""What the axes of tokens are called, by their number."""


def input_name(loc: str) -> str:
    """Return the name of the input of the block at `loc`."""
    return f"x.{loc}"


def output_name(loc: str) -> str:
    """Return the name of the output of the block at `loc`."""
    return f"y.{loc}"


class Around(Protocol):
    """What is between the blocks of a graph."""

    def order(self, locs: Sequence[str]) -> Sequence[str]:
        """Return the blocks in the order in which they run."""
        ...

    def begin(self, graph: Graph) -> None:
        """Add what is before all blocks."""
        ...

    def enter(self, graph: Graph, loc: str, type: TensorType) -> Value:
        """Add the input of a block."""
        ...

    def leave(self, graph: Graph, loc: str, value: Value) -> None:
        """Take the output of a block."""
        ...

    def end(self, graph: Graph) -> None:
        """Add what is behind all blocks."""
        ...


class Alone:
    """Nothing is: each block has an input and an output of the graph."""

    def order(self, locs: Sequence[str]) -> Sequence[str]:
        """Return the blocks as they are: none depends on another."""
        return locs

    def begin(self, graph: Graph) -> None:
        """Add nothing."""

    def enter(self, graph: Graph, loc: str, type: TensorType) -> Value:
        """Add an input."""
        return graph.input(input_name(loc), type)

    def leave(self, graph: Graph, loc: str, value: Value) -> None:
        """Add an output."""
        graph.set_output(output_name(loc), value)

    def end(self, graph: Graph) -> None:
        """Add nothing."""


def build_graph(
    survey: Survey,
    *,
    name: str,
    is_causal: bool,
    labels: Mapping[Val, Dims],
    around: Around | None = None,
) -> Graph:
    """Return the blocks as one graph.

    Parameters are named after leaves, and their weights are read from them.

    Args:
      survey: the blocks.
      name: of the function.
      is_causal: whether no token may depend on later ones.
      labels: which dimensions of values are which axes of tokens, as far as that is known.
      around: what is between the blocks; by default `Alone`.
    """
    sites = survey.first_sites()
    graph, around = Graph(GRAPH, {"function": name}), around or Alone()
    found = {one.loc: (one, sites[key]) for key, one in survey.instances().items()}
    blocks = [found[loc] for loc in around.order(list(found))]
    sizes: dict[tuple[str, int], str] = {}
    types = [_input_type(site, sizes, labels) for _, site in blocks]
    around.begin(graph)
    for (one, site), type in zip(blocks, types, strict=True):
        x = around.enter(graph, one.loc, type)
        params = [_param(graph, one, i) for i in range(len(one.params))]
        around.leave(graph, one.loc, _emit(Builder(graph, loc=one.loc), site, x, params))
    around.end(graph)
    if is_causal:
        graph.attrs["causal_inputs"] = list(graph.inputs)
    return graph


def token_axes(site: Site, labels: Mapping[Val, Dims]) -> tuple[str, ...]:
    """Return the names of the axes of tokens of a block's input, in order."""
    island = site.island
    dims = labels.get(island.x)
    count = len(island.x.shape) - 1
    plain = TOKEN_AXES.get(count) or tuple(f"axis{i}" for i in range(count))
    if dims is None:
        return plain
    own = [label for i, label in enumerate(dims) if i != island.outer]
    named = ["_".join(name for name, _ in label) for label in own]
    return tuple(unique(n or f"axis{i}" for i, n in enumerate(named)))


def _input_type(
    site: Site, sizes: dict[tuple[str, int], str], labels: Mapping[Val, Dims]
) -> TensorType:
    island = site.island
    shape = [n for i, n in enumerate(island.x.shape) if i != island.outer]
    axes = []
    for axis, size in zip(token_axes(site, labels), shape, strict=True):
        if (axis, size) not in sizes:
            sizes[axis, size] = _variable(axis, sizes)
        axes.append(Axis(axis, sizes[axis, size]))
    width = island.x.shape[island.outer]
    return TensorType(F32, (*axes, Axis(OUTER, width)))


def _variable(name: str, sizes: dict[tuple[str, int], str]) -> str:
    """Return a variable for another size of an axis."""
    letter = name[0].upper()
    taken = [v for v in sizes.values() if v[0] == letter]
    return f"{letter}{len(taken) + 1}" if taken else letter


def _param(graph: Graph, instance: Instance, at: int) -> Value:
    name, weight = instance.params[at], instance.weights[at]
    if name in graph.params:
        return graph.params[name]
    return graph.param(name, weight.type.with_dtype(F32), weight, loc=instance.loc)


def _emit(builder: Builder, site: Site, x: Value, params: list[Value]) -> Value:
    made: dict[str, Value] = {"x": x}
    made |= {f"p{i}": p for i, p in enumerate(params)}
    for number, operation in enumerate(site.block.operations):
        operands = (made[o] for o in operation.operands)
        attrs: dict[str, Any] = dict(operation.attrs)
        made[f"v{number}"] = builder.node(operation.name, *operands, **attrs).result
    return made[f"v{len(site.block.operations) - 1}"]


# A graph of all blocks cut into parts: what depends on the input of one block alone.
#
# What depends on several blocks, the losses of all of them, is an epilogue on values that parts
# return besides their output.


@dataclass(frozen=True)
class Part:
    """What a graph computes of one block.

    Attributes:
      x: the block's input.
      y: its output.
      nodes: what the output needs, in order.
      side_nodes: what the other values need as well, in order.
      side: values that are outputs of the graph, or that the epilogue reads.
    """

    x: Value
    y: Value
    nodes: tuple[Node, ...]
    side_nodes: tuple[Node, ...]
    side: tuple[Value, ...]

    @property
    def params(self) -> tuple[Value, ...]:
        """The parameters, in the order of use."""
        used = (v for n in self.side_nodes for v in n.operands if v.is_param)
        return tuple(dict.fromkeys(used))

    @property
    def extra(self) -> tuple[Value, ...]:
        """The other inputs of the graph that it takes: a random key, a padding mask."""
        used = (v for n in self.side_nodes for v in n.operands)
        own = (v for v in used if v.node is None and not v.is_param and v is not self.x)
        return tuple(dict.fromkeys(own))


@dataclass(frozen=True)
class Parts:
    """A graph in parts.

    Attributes:
      graph: the graph.
      blocks: the part of each block, by its location.
      epilogue: what depends on several blocks, in order.
    """

    graph: Graph
    blocks: Mapping[str, Part]
    epilogue: tuple[Node, ...]

    @property
    def outputs(self) -> dict[str, Value]:
        """The outputs of the graph besides those of the blocks: losses and metrics."""
        mine = {part.y for part in self.blocks.values()}
        named = {output_name(loc) for loc in self.blocks}
        return {n: v for n, v in self.graph.outputs.items() if n not in named or v not in mine}

    def finish(self, given: Mapping[Value, jax.Array], dtype: DType) -> dict[str, jax.Array]:
        """Return the outputs besides those of the blocks from the values that parts returned."""
        values = lower_values(list(self.epilogue), given, dtype)
        return {n: finalize_output(values[v], v) for n, v in self.outputs.items() if v in values}


def cut(graph: Graph, locations: Iterable[str]) -> Parts:
    """Return the parts of a graph that has an input and an output for each location."""
    locs = list(locations)
    owner = _Owners(graph, locs)
    outputs = graph.outputs
    wanted = {v for n, v in outputs.items() if n not in {output_name(loc) for loc in locs}}
    blocks = {}
    for loc in locs:
        x, y = graph.inputs[input_name(loc)], outputs[output_name(loc)]
        side = tuple(v for v in owner.made[loc] if v in wanted or owner.is_shared(v))
        blocks[loc] = Part(x, y, owner.needed((y,)), owner.needed((y, *side)), side)
    return Parts(graph, blocks, tuple(owner.epilogue))


@dataclass
class _Owners:
    """Which block each node depends on."""

    graph: Graph
    locs: list[str]
    made: dict[str, list[Value]] = field(default_factory=dict)
    epilogue: list[Node] = field(default_factory=list)
    order: dict[Node, int] = field(default_factory=dict)
    late: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.made = {loc: [] for loc in self.locs}
        of: dict[Value, frozenset[str]] = {}
        for loc in self.locs:
            of[self.graph.inputs[input_name(loc)]] = frozenset((loc,))
        for i, node in enumerate(self.graph):
            self.order[node] = i
            depends = frozenset().union(*(of.get(v, frozenset()) for v in node.operands))
            of.update(dict.fromkeys(node.results, depends))
            if len(depends) == 1:
                self.made[next(iter(depends))] += node.results
            elif depends:
                self.epilogue.append(node)
        self.late = set(self.epilogue)
        # Constants are made again wherever they are used.
        for node in reversed(list(self.graph)):
            is_constant = not of[node.results[0]]
            if is_constant and any(u in self.late for v in node.results for u in v.users):
                self.late.add(node)
        self.epilogue = sorted(self.late, key=self.order.__getitem__)

    def is_shared(self, value: Value) -> bool:
        """Whether the epilogue reads a value."""
        return any(user in self.late for user in value.users)

    def needed(self, values: Iterable[Value]) -> tuple[Node, ...]:
        """Return the nodes that `values` are made by, in order."""
        found: set[Node] = set()
        stack = [v.node for v in values]
        while stack:
            node = stack.pop()
            if node is None or node in found:
                continue
            found.add(node)
            stack.extend(v.node for v in node.operands)
            stack.extend(_setters(node))
        return tuple(sorted(found, key=self.order.__getitem__))


def _setters(node: Node) -> list[Node | None]:
    """Return what sets the extents of the types of a node."""
    types = (v.type for v in (*node.operands, *node.results))
    return [setter_of(e).node for t in types for e in t.extents]


# Whether two parts are the same computation: the same operations on corresponding operands.


def part_key(part: Part) -> tuple[object, ...]:
    """Return what is equal for parts that one lowering serves."""
    numbers: dict[Value, int] = {part.x: 0}
    lines: list[object] = [_axes(part.x, numbers)]
    for node in part.side_nodes:
        for operand in node.operands:
            if operand.node is None and operand not in numbers:
                numbers[operand] = len(numbers)
                lines.append(_axes(operand, numbers))
        uses = tuple(numbers[v] for v in node.operands)
        for value in node.results:
            numbers[value] = len(numbers)
        types = tuple(_axes(v, numbers) for v in node.results)
        lines.append((node.op.name, uses, attributes(node.attrs), types))
    lines.append(tuple(numbers[v] for v in (part.y, *part.side)))
    return tuple(lines)


def _axes(value: Value, numbers: dict[Value, int]) -> object:
    return (value.type.dtype.name, tuple(_axis(a, numbers) for a in value.type.axes))


def _axis(axis: Axis, numbers: dict[Value, int]) -> object:
    if isinstance(axis.size, Extent):
        return (axis.name, axis.size.kind, numbers.get(setter_of(axis.size), -1))
    return (axis.name, axis.size)


# What lies between blocks: where each takes its input from, and how much of the program is there.
#
# A function is followed with the names of what its values depend on: its arguments, and blocks.
# Loops that pick the weights of blocks are followed iteration by iteration, as the blocks are.

Sources = frozenset[str]
"""Names of arguments, and locations of blocks."""

NOTHING: Sources = frozenset()


@dataclass(frozen=True)
class Region:
    """A part of a function before a block, or before a result.

    Attributes:
      takes: the arguments and the blocks that it depends on, not through other blocks.
      equations: how many equations are between it and the block before.
      lines: the first and the last of them in the user's program.
    """

    takes: Sources
    equations: int = 0
    lines: str = ""


@dataclass
class Walk:
    """Follows a function.

    Args:
      sites: where blocks run.
      instances: the blocks.
    """

    sites: Sequence[Site]
    instances: Mapping[Key, Instance]
    regions: dict[str, Region] = field(default_factory=dict)
    _passed: list[Step] = field(default_factory=list)
    _ends: dict[Step, Site] = field(default_factory=dict)
    _inside: set[Step] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ends = {site.island.steps[-1]: site for site in self.sites}
        self._inside = {step for site in self.sites for step in site.island.steps}

    def run(self, scope: Scope, arguments: Mapping[Val, str]) -> list[Region]:
        """Find the regions before blocks, in `regions`; return those before the results."""
        given = [frozenset((arguments[v],)) if v in arguments else NOTHING for v in scope.inputs]
        takes = self._scope(scope, given, {})
        last = self._region(NOTHING)
        return [Region(one, last.equations, last.lines) for one in takes]

    def _region(self, takes: Sources) -> Region:
        """Return the region since the last one."""
        lines = [line for step in self._passed if (line := user_line(step.equation))]
        ends = dict.fromkeys((lines[0], lines[-1])) if lines else {}
        made = Region(takes, len(self._passed), " to ".join(ends))
        self._passed = []
        return made

    def _scope(
        self, scope: Scope, given: Sequence[Sources], at: Mapping[Hashable, int]
    ) -> list[Sources]:
        known = dict(zip(scope.inputs, given, strict=True))
        for step in scope.steps:
            if step in self._ends:
                site = self._ends[step]
                known[site.island.output] = self._block(site, known.get(site.island.x, NOTHING), at)
            elif step not in self._inside:
                taken = [known.get(v, NOTHING) for v in step.inputs]
                known.update(zip(step.outputs, self._step(step, taken, at), strict=True))
        return [known.get(v, NOTHING) for v in scope.outputs]

    def _block(self, site: Site, takes: Sources, at: Mapping[Hashable, int]) -> Sources:
        number = 0
        for loop, length in zip(site.loops, site.lengths, strict=True):
            number = number * length + at[loop]
        loc = self.instances[site.keys[number]].loc
        # A block that runs again takes more than what its first run shows.
        if loc not in self.regions:
            self.regions[loc] = self._region(takes)
        return frozenset((loc,))

    def _step(
        self, step: Step, taken: list[Sources], at: Mapping[Hashable, int]
    ) -> Sequence[Sources]:
        if not step.bodies or not any(step in s.island.scope.owners for s in self.sites):
            self._passed.append(step)
            every = NOTHING.union(*taken)
            return [every for _ in step.outputs]
        if step.name == "scan":
            return self._scan(step, taken, at)
        if step.name == "cond":
            index, *rest = taken
            branches = [self._scope(body, rest, at) for body in step.bodies]
            return [index.union(*each) for each in zip(*branches, strict=True)]
        if step.name == "while":
            fixed = step.params["cond_nconsts"], step.params["body_nconsts"]
            return self._scope(step.bodies[1], taken[fixed[0] :], at)
        return self._scope(step.bodies[0], taken, at)

    def _scan(self, step: Step, taken: list[Sources], at: Mapping[Hashable, int]) -> list[Sources]:
        consts, carried = scan_sizes(step.params)
        fixed, carry, stacked = (
            taken[:consts],
            taken[consts : consts + carried],
            taken[consts + carried :],
        )
        is_each = any(step in site.loops for site in self.sites)
        made = [NOTHING for _ in step.outputs[carried:]]
        turns = range(int(step.params["length"]) if is_each else 1)
        for turn in reversed(turns) if step.params["reverse"] else turns:
            found = self._scope(step.bodies[0], [*fixed, *carry, *stacked], {**at, step: turn})
            carry = found[:carried]
            made = [a | b for a, b in zip(made, found[carried:], strict=True)]
        return [*carry, *made]


# The graph of a whole function: its blocks as operations, all else as regions of JAX.


@dataclass(frozen=True)
class Surroundings:
    """What is around the blocks of a function.

    Attributes:
      arguments: the types of its arguments by name, the parameters apart.
      before: the region before each block, by its location.
      results: the types of those results that depend on a block, and the regions before them.
    """

    arguments: Mapping[str, TensorType]
    before: Mapping[str, Region]
    results: Mapping[str, tuple[TensorType, Region]]
    _made: dict[str, Value] = field(default_factory=dict)

    def order(self, locs: Sequence[str]) -> Sequence[str]:
        """Return the blocks in the order in which they run first."""
        return list(self.before)

    def begin(self, graph: Graph) -> None:
        """Add the arguments."""
        self._made.update({n: graph.input(n, t) for n, t in self.arguments.items()})

    def enter(self, graph: Graph, loc: str, type: TensorType) -> Value:
        """Add the region before a block, whose result is its input."""
        return self._add(graph, self.before[loc], input_name(loc), type, loc)

    def leave(self, graph: Graph, loc: str, value: Value) -> None:
        """Note the output of a block."""
        self._made[loc] = value

    def end(self, graph: Graph) -> None:
        """Add the results of the function."""
        for name, (type, region) in self.results.items():
            graph.set_output(name, self._add(graph, region, name, type))

    def _add(
        self, graph: Graph, region: Region, name: str, type: TensorType, loc: str = ""
    ) -> Value:
        operands = [value for source, value in self._made.items() if source in region.takes]
        if not operands:
            return graph.input(name, type)
        attrs = {
            "into": tuple((a.name, a.size) for a in type.axes),
            "dtype": type.dtype.name,
            "equations": region.equations,
            "lines": region.lines,
        }
        return graph.append("jax", operands, attrs, names=(name,), loc=loc).result


def surroundings(traced: Traced, found: Survey, labels: Mapping[Val, Dims]) -> Surroundings:
    """Return what is around the blocks of a traced function."""
    named = {v: n for n, v in traced.argument_values.items()}
    arguments = {n: t for v, n in named.items() if (t := _type(v, labels)) is not None}
    walk = Walk(found.sites, found.instances())
    regions = walk.run(traced.scope, named)
    blocks = walk.regions.keys()
    results = {
        name: (type, region)
        for name, value, region in zip(
            _result_names(traced), traced.scope.outputs, regions, strict=True
        )
        if region.takes & blocks and (type := _type(value, labels)) is not None
    }
    return Surroundings(arguments, walk.regions, results)


def _result_names(traced: Traced) -> list[str]:
    numbers = range(traced.treedef.num_leaves)
    tree = jax.tree_util.tree_unflatten(traced.treedef, numbers)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return unique(f"result.{path_name(path)}" if path else "result" for path in paths)


def _type(value: Val, labels: Mapping[Val, Dims]) -> TensorType | None:
    """Return the type of a value that is of no block; None where the IR has no such elements."""
    dtype = _dtype(value)
    if dtype is None:
        return None
    dims = labels.get(value, ((),) * len(value.shape))
    names = unique(_names(dims))
    return TensorType(dtype, tuple(map(Axis, names, value.shape)))


def _names(dims: Sequence[Sequence[tuple[str, int]]]) -> Iterator[str]:
    for number, label in enumerate(dims):
        name = "_".join(n for n, _ in label)
        yield name if is_name(name) else f"axis{number}"


def _dtype(value: Val) -> DType | None:
    return next(
        (d for d in DTYPES.values() if d.kind != "key" and d.numpy == value.aval.dtype), None
    )
