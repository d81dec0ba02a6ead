"""Which dimensions of the values of a function are axes of tokens, as its caller names them.

A label goes with a dimension through the program: forward only, and lost where nothing is known.
It names the axes of a block's tokens, and shows a product that sums over tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.model.open import GRAPH
from moecc.types import F32, Axis, DType, TensorType, is_name
from moecc_backends.jaxpr.blocks import INNER, OUTER
from moecc_backends.jaxpr.scopes import (
    CHECKPOINTS,
    Equation,
    JaxprScope,
    TracedFunction,
    Variable,
    rearranged,
)
from moecc_backends.jaxpr.survey import BlockSite, Survey, equations_of
from moecc_backends.jaxpr.symbols import function_of
from moecc_backends.jaxpr.views import NotABlock, callee, dtype_named, path_name, unique
from moecc_backends.xla.lower.function import finalize_output, lower_values
from moecc_backends.xla.lower.scan import computation_key, type_key

Label = tuple[tuple[str, int], ...]
"""Names and sizes of the axes of tokens that a dimension runs over, outermost first."""

Labels = tuple[Label, ...]
"""The label of each dimension; empty where it is no axis of tokens."""

RESERVED = (OUTER, INNER, "group", "expert", "slot", "choice")
"""Names that blocks and routings give to axes."""

_BY_PLACE = frozenset(
    ("slice", "dynamic_slice", "dynamic_update_slice", "pad", "concatenate", "rev", "split")
) | {"convert_element_type", "copy", "cumsum", "sort", "reduce_precision"}  # fmt: skip
"""Equations whose results have the dimensions of operands of their rank."""


def token_labels(
    traced: TracedFunction, tokens: Mapping[str, Sequence[str]], where: str
) -> dict[Variable, Labels]:
    """Return which dimensions of the values of a function are axes of tokens.

    Args:
      traced: the function.
      tokens: names of the axes by argument; fewer names than dimensions name the first ones.
      where: the line of the function.

    Raises:
      UsageError: `tokens` is no mapping.
      InputError: there is no such argument, or it has fewer dimensions than names.
    """
    if not isinstance(tokens, Mapping):
        raise UsageError(
            "`tokens` is no mapping of arguments to names of axes",
            expected='{"batch.tokens": ("batch", "seq")}',
            found=repr(tokens),
        )
    problems = [_misfit(name, axes, traced.arguments) for name, axes in tokens.items()]
    if any(problems):
        raise InputError(replace(p, where=f"{where}, {p.where}") for p in problems if p)
    labels: dict[Variable, Labels] = {}
    for name, axes in tokens.items():
        variable = traced.arguments[name]
        named: list[Label] = [((axis, n),) for axis, n in zip(axes, variable.shape, strict=False)]
        labels[variable] = (*named, *((),) * (len(variable.shape) - len(named)))
    _run(traced.scope, [_label(v, labels) for v in traced.scope.inputs], labels)
    return labels


def _misfit(name: str, axes: Sequence[str], arguments: Mapping[str, Variable]) -> Problem | None:
    where = f"tokens[{name!r}]"
    if name not in arguments:
        hint = nearest(str(name), arguments) or f"arrays: {', '.join(arguments) or 'none'}"
        return Problem("the function has no such argument", where, hint=hint)
    shape = arguments[name].shape
    if isinstance(axes, str):
        return Problem("the names of axes are one word", where, f"a tuple, ({axes!r},)", axes)
    if not isinstance(axes, Sequence) or not all(isinstance(a, str) for a in axes):
        return Problem("not names of axes", where, 'words, ("batch", "seq")', repr(axes))
    if len(axes) > len(shape):
        words = "the argument has fewer dimensions than axes are named"
        return Problem(words, where, ", ".join(axes), str(list(shape)))
    if not all(is_name(a) and a not in RESERVED for a in axes) or len(set(axes)) < len(axes):
        expected = f"different words, none of {', '.join(RESERVED)}"
        return Problem("not names of axes of tokens", where, expected, ", ".join(axes))
    return None


def refuse_mixing(survey: Survey, labels: Mapping[Variable, Labels]) -> None:
    """Turn blocks that sum over tokens, or have none, into near misses."""
    for site in list(survey.sites) if labels else []:
        x_labels = labels.get(site.slice.x, ())
        summed = x_labels[site.slice.outer] if x_labels else ()
        if summed:
            axis = " and ".join(name for name, _ in summed)
            words = f"its products sum over {axis}, an axis of tokens: it mixes them"
            survey.refuse(site, f"{words}, and routes none")
        elif not any(x_labels):
            survey.refuse(site, "its input has no axis of tokens: name it in `tokens`")


def _label(variable: Variable, labels: Mapping[Variable, Labels]) -> Labels:
    return labels.get(variable, ((),) * len(variable.shape))


def _run(
    scope: JaxprScope, inputs: Sequence[Labels], labels: dict[Variable, Labels]
) -> list[Labels]:
    """Label all values of a scope from those of its inputs; return those of its results."""
    labels.update(zip(scope.inputs, inputs, strict=True))
    for equation in scope.equations:
        operands = [_label(v, labels) for v in equation.inputs]
        shapes = [v.shape for v in equation.outputs]
        try:
            results = _results(equation, operands, labels)
        except (IndexError, KeyError, TypeError, ValueError, NotABlock):
            # A form of the primitive that is not known here: its labels are lost, not wrong.
            results = []
        if list(map(len, results)) == list(map(len, shapes)):
            labels.update(zip(equation.outputs, results, strict=True))
    return [_label(v, labels) for v in scope.outputs]


def _results(
    equation: Equation, operands: list[Labels], labels: dict[Variable, Labels]
) -> Sequence[Labels]:
    """Return the labels of the results of an equation from those of its operands."""
    name, params, outputs = equation.name, equation.params, equation.outputs
    if function_of(equation.eqn) is not None or name in _BY_PLACE:
        ranks = [len(v.shape) for v in outputs]
        return [_joined([d for d in operands if len(d) == rank], rank) for rank in ranks]
    if name in ("transpose", "squeeze", "broadcast_in_dim", "reshape"):
        ((_, axes),) = rearranged(_LabelMoves, None, operands[0], equation)
        return [tuple(axis or () for axis in axes)]
    if name == "dot_general":
        (summed, batch) = params["dimension_numbers"]
        dims = [operands[0][i] or operands[1][j] for i, j in zip(*batch, strict=True)]
        for operand, over, shared in zip(operands, summed, batch, strict=True):
            dims += [d for i, d in enumerate(operand) if i not in over and i not in shared]
        return [tuple(dims)]
    if name == "gather":
        numbers = params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        window = iter([d for i, d in enumerate(operands[0]) if i not in gone])
        places = iter(operands[1][:-1])
        rank = range(len(outputs[0].shape))
        return [tuple(next(window if i in numbers.offset_dims else places) for i in rank)]
    if name == "conv_general_dilated":
        spec = params["dimension_numbers"]
        order = [spec.lhs_spec[spec.out_spec.index(i)] for i in range(len(spec.out_spec))]
        return [tuple(operands[0][i] if i != spec.lhs_spec[1] else () for i in order)]
    if name in ("scan", "while", "cond"):
        return _looped(equation, operands, labels)
    if callee(equation.eqn) is not None or name in (*CHECKPOINTS, *_CUSTOM):
        return _run(equation.inner(), operands, labels)
    if name.startswith(("reduce_", "arg")):
        remaining = tuple(d for i, d in enumerate(operands[0]) if i not in params["axes"])
        return [remaining for _ in outputs]
    if name in ("iota", "random_bits"):
        return []
    pairs = list(zip(equation.inputs, operands, strict=True))
    shapes = [v.shape for v in outputs]
    return [_joined([d for v, d in pairs if v.shape == shape], len(shape)) for shape in shapes]


_CUSTOM = ("custom_jvp_call", "custom_vjp_call")


def _looped(
    equation: Equation, operands: list[Labels], labels: dict[Variable, Labels]
) -> Sequence[Labels]:
    """Return the labels of the results of a loop or a branch, after labelling its bodies."""
    current = list(operands)
    bodies = equation.body_operands()
    carried = [at for at, role in bodies[-1] if role == "carried"]
    # What a scan carries may gain labels in its first iteration.
    for _ in range(2):
        results = [
            _run(
                equation.inner(i),
                [current[at][1:] if role == "stacked" else current[at] for at, role in roles],
                labels,
            )
            for i, roles in enumerate(bodies)
        ]
        before = list(current)
        for at, result in zip(carried, results[-1], strict=False):
            current[at] = _joined((current[at], result), len(result))
        if equation.name != "scan" or current == before:
            break
    if equation.name == "scan":
        stacked = [((), *result) for result in results[0][len(carried) :]]
        return [*results[0][: len(carried)], *stacked]
    if equation.name == "while":
        return results[1]
    return [_joined(branches, len(branches[0])) for branches in zip(*results, strict=True)]


def _joined(labels: Sequence[Labels], rank: int) -> Labels:
    return tuple(next((d[i] for d in labels if d[i]), ()) for i in range(rank))


class _LabelMoves:
    """How labels change with the axes of an array, see `rearranged`."""

    @staticmethod
    def sliced(array: None, axis: Label, start: int, stop: int) -> tuple[None, Label]:
        return None, axis

    @staticmethod
    def indexed(array: None, axis: Label, index: int) -> None:
        return None

    @staticmethod
    def regrouped(
        array: None, axes: Sequence[Label | None], parts: Sequence[int]
    ) -> tuple[None, list[Label | None]]:
        """Cut the axes of tokens of all dimensions again, where they make up the new sizes."""
        if not all(axes):
            return None, [None for _ in parts]
        tokens = [token for axis in axes if axis for token in axis]
        labels: list[Label | None] = []
        for size in parts:
            product, label = 1, list[tuple[str, int]]()
            while tokens and product < size:
                label.append(tokens.pop(0))
                product *= label[-1][1]
            labels.append(tuple(label) if product == size else None)
        return None, labels


# The blocks of a function as one graph; the graph in parts again; the function around them.
#
# Each block has an input and an output of the graph.  `graph_of_function` has regions of JAX
# between
# the blocks instead, to look at.

TOKEN_AXES = {1: ("token",), 2: ("batch", "seq")}
"""What the axes of tokens are called, by their number."""

VariableLabels = Mapping[Variable, Labels]
"""Which dimensions of values are which axes of tokens, as far as that is known."""


def input_name(loc: str) -> str:
    """Return the name of the input of the block at `loc`."""
    return f"x.{loc}"


def output_name(loc: str) -> str:
    """Return the name of the output of the block at `loc`."""
    return f"y.{loc}"


def graph_of_blocks(survey: Survey, *, name: str, is_causal: bool, labels: VariableLabels) -> Graph:
    """Return the blocks as one graph, each with an input and an output.

    Parameters are named after leaves, and their weights are read from them.

    Args:
      survey: the blocks.
      name: of the function.
      is_causal: whether no token may depend on later ones.
      labels: the axes of tokens.
    """
    graph = Graph(GRAPH, {"function": name})
    blocks = _Blocks(survey, labels)
    inputs = {loc: graph.input(input_name(loc), type) for loc, type in blocks.types.items()}
    for loc, x in inputs.items():
        graph.set_output(output_name(loc), blocks.emit(graph, loc, x))
    return _finished(graph, is_causal)


def graph_of_function(
    traced: TracedFunction, survey: Survey, *, name: str, is_causal: bool, labels: VariableLabels
) -> Graph:
    """Return a function as a graph: its blocks as operations, all else as regions of JAX.

    Args:
      traced: the function.
      survey: its blocks.
      name: of the function.
      is_causal: whether no token may depend on later ones.
      labels: the axes of tokens.
    """
    graph = Graph(GRAPH, {"function": name})
    walk = _RegionWalk(survey)
    arguments = {v: n for n, v in traced.arguments.items()}
    results = walk.run(traced.scope, arguments)
    blocks = _Blocks(survey, labels, order=list(walk.regions))
    types = {n: _type(v, labels) for v, n in arguments.items()}
    values = {n: graph.input(n, type) for n, type in types.items() if type is not None}

    def add(region: JaxRegion, name: str, type: TensorType, loc: str = "") -> Value:
        operands = [value for source, value in values.items() if source in region.takes]
        if not operands:
            return graph.input(name, type)
        attrs = {
            "into": tuple((a.name, a.size) for a in type.axes),
            "dtype": type.dtype.name,
            "equations": region.equations,
            "lines": region.lines,
        }
        return graph.append("jax", operands, attrs, names=(name,), loc=loc).result

    for loc, region in walk.regions.items():
        x = add(region, input_name(loc), blocks.types[loc], loc)
        values[loc] = blocks.emit(graph, loc, x)
    numbers = range(traced.treedef.num_leaves)
    tree = jax.tree_util.tree_unflatten(traced.treedef, numbers)
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    names = unique(f"result.{path_name(path)}" if path else "result" for path in paths)
    for name, variable, region in zip(names, traced.scope.outputs, results, strict=True):
        result_type = _type(variable, labels)
        if region.takes & walk.regions.keys() and result_type is not None:
            graph.set_output(name, add(region, name, result_type))
    return _finished(graph, is_causal)


def _finished(graph: Graph, is_causal: bool) -> Graph:
    if is_causal:
        graph.attrs["causal_inputs"] = list(graph.inputs)
    return graph


def _type(variable: Variable, labels: VariableLabels) -> TensorType | None:
    """Return the type of a value that is of no block; None where the IR has no such elements."""
    dtype = dtype_named(variable.aval.dtype)
    if dtype is None:
        return None
    dims = labels.get(variable, ((),) * len(variable.shape))
    joined = ["_".join(name for name, _ in label) for label in dims]
    names = unique(n if is_name(n) else f"axis{i}" for i, n in enumerate(joined))
    return TensorType(dtype, tuple(map(Axis, names, variable.shape)))


class _Blocks:
    """The blocks of a survey by location, and the types of their inputs."""

    def __init__(
        self, survey: Survey, labels: VariableLabels, order: Sequence[str] | None = None
    ) -> None:
        sites = survey.first_sites
        blocks = {i.loc: (i, sites[key][0]) for key, i in survey.instances().items()}
        self._blocks = {loc: blocks[loc] for loc in order or blocks}
        self._variables: dict[tuple[str, int], str] = {}
        self.types = {
            loc: self._input_type(site, labels) for loc, (_, site) in self._blocks.items()
        }

    def _input_type(self, site: BlockSite, labels: VariableLabels) -> TensorType:
        """Return the type of a block's input: axes of tokens, of variable sizes, and embed."""
        x, outer = site.slice.x, site.slice.outer
        sizes = [n for i, n in enumerate(x.shape) if i != outer]
        names = TOKEN_AXES.get(len(sizes)) or tuple(f"axis{i}" for i in range(len(sizes)))
        if x in labels:
            tokens = [label for i, label in enumerate(labels[x]) if i != outer]
            joined = ["_".join(name for name, _ in label) for label in tokens]
            names = tuple(unique(n or f"axis{i}" for i, n in enumerate(joined)))
        axes = [Axis(n, self._variable(n, size)) for n, size in zip(names, sizes, strict=True)]
        return TensorType(F32, (*axes, Axis(OUTER, x.shape[outer])))

    def _variable(self, axis: str, size: int) -> str:
        """Return the variable for the size of an axis; one more where it has another size."""
        if (axis, size) not in self._variables:
            letter = axis[0].upper()
            count = len([v for v in self._variables.values() if v[0] == letter])
            self._variables[axis, size] = f"{letter}{count + 1}" if count else letter
        return self._variables[axis, size]

    def emit(self, graph: Graph, loc: str, x: Value) -> Value:
        """Add the operations of a block to a graph; return its output."""
        instance, site = self._blocks[loc]
        builder = Builder(graph, loc=loc)
        values = {"x": x}
        for i, name in enumerate(instance.params):
            weight = instance.weights[i]
            if name not in graph.params:
                graph.param(name, weight.type.with_dtype(F32), weight, loc=loc)
            values[f"p{i}"] = graph.params[name]
        for i, operation in enumerate(site.block.operations):
            operands = (values[o] for o in operation.operands)
            attrs: dict[str, Any] = dict(operation.attrs)
            values[f"v{i}"] = builder.node(operation.name, *operands, **attrs).result
        return values[f"v{len(site.block.operations) - 1}"]


# What lies between blocks: where each takes its input from, and how much of the program is there.


@dataclass(frozen=True)
class JaxRegion:
    """A part of a function before a block, or before a result.

    Attributes:
      takes: the arguments and the blocks that it depends on, not through other blocks.
      equations: how many equations are between it and the block before.
      lines: the first and the last of them in the user's program.
    """

    takes: frozenset[str]
    equations: int
    lines: str


class _RegionWalk:
    """Follows a function with the names of what its values depend on: its arguments, and blocks.

    Loops that pick the weights of blocks are followed iteration by iteration, as the blocks are.
    """

    def __init__(self, survey: Survey) -> None:
        self.regions: dict[str, JaxRegion] = {}
        self._instances = survey.instances()
        self._ends = {site.slice.equations[-1]: site for site in survey.sites}
        self._inside = equations_of(survey.sites)
        self._holders = {e for site in survey.sites for e in site.slice.scope.owners}
        self._picking = {loop for site in survey.sites for loop in site.loops}
        self._passed: list[Equation] = []

    def run(self, scope: JaxprScope, arguments: Mapping[Variable, str]) -> list[JaxRegion]:
        """Find the regions before blocks, in `regions`; return those before the results."""
        inputs = [frozenset((arguments[v],) if v in arguments else ()) for v in scope.inputs]
        takes = self._scope(scope, inputs, {})
        last = self._region(frozenset())
        return [JaxRegion(sources, last.equations, last.lines) for sources in takes]

    def _region(self, takes: frozenset[str]) -> JaxRegion:
        """Return the region since the last one."""
        lines = [line for equation in self._passed if (line := equation.line)]
        ends = dict.fromkeys((lines[0], lines[-1])) if lines else {}
        region = JaxRegion(takes, len(self._passed), " to ".join(ends))
        self._passed = []
        return region

    def _scope(
        self, scope: JaxprScope, inputs: Sequence[frozenset[str]], iteration: Mapping[Hashable, int]
    ) -> list[frozenset[str]]:
        sources = dict(zip(scope.inputs, inputs, strict=True))
        for equation in scope.equations:
            if equation in self._ends:
                site = self._ends[equation]
                takes = sources.get(site.slice.x, frozenset())
                number = 0
                for loop, length in zip(site.loops, site.lengths, strict=True):
                    number = number * length + iteration[loop]
                loc = self._instances[site.keys[number]].loc
                # A block that runs again takes more than what its first run shows.
                if loc not in self.regions:
                    self.regions[loc] = self._region(takes)
                sources[site.slice.output] = frozenset((loc,))
            elif equation not in self._inside:
                operands = [sources.get(v, frozenset()) for v in equation.inputs]
                results = self._equation(equation, operands, iteration)
                sources.update(zip(equation.outputs, results, strict=True))
        return [sources.get(v, frozenset()) for v in scope.outputs]

    def _equation(
        self, equation: Equation, operands: list[frozenset[str]], iteration: Mapping[Hashable, int]
    ) -> Sequence[frozenset[str]]:
        if equation not in self._holders:
            self._passed.append(equation)
            return [frozenset().union(*operands)] * len(equation.outputs)
        bodies = equation.body_operands()
        if equation.name == "cond":
            branches = [
                self._scope(body, [operands[at] for at, _ in roles], iteration)
                for body, roles in zip(equation.bodies, bodies, strict=True)
            ]
            return [operands[0].union(*each) for each in zip(*branches, strict=True)]
        body, roles = equation.bodies[-1], bodies[-1]
        if equation.name != "scan":
            return self._scope(body, [operands[at] for at, _ in roles], iteration)
        carried = [at for at, role in roles if role == "carried"]
        stacked = [frozenset[str]() for _ in equation.outputs[len(carried) :]]
        turns = range(int(equation.params["length"]) if equation in self._picking else 1)
        for turn in reversed(turns) if equation.params["reverse"] else turns:
            results = self._scope(body, operands, {**iteration, equation: turn})
            for at, sources in zip(carried, results, strict=False):
                operands[at] = sources
            stacked = [a | b for a, b in zip(stacked, results[len(carried) :], strict=True)]
        return [*(operands[at] for at in carried), *stacked]


# A graph of all blocks cut into parts: what depends on the input of one block alone.  What depends
# on several blocks, the losses of all of them, is an epilogue on values that parts return besides
# their output.


@dataclass(frozen=True)
class BlockPart:
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
        return tuple(v for v in self._sources if v.is_param)

    @property
    def extra(self) -> tuple[Value, ...]:
        """The other inputs of the graph that it takes: a random key, a padding mask."""
        return tuple(v for v in self._sources if not v.is_param and v is not self.x)

    @property
    def _sources(self) -> dict[Value, None]:
        used = (v for n in self.side_nodes for v in n.operands)
        return dict.fromkeys(v for v in used if v.node is None)

    def key(self) -> tuple[object, ...]:
        """Return what is equal for parts that are the same computation: one lowering serves them.

        They have the same operations on corresponding operands.
        """
        operands = list(dict.fromkeys((self.x, *self._sources)))
        numbers = {v: number for number, v in enumerate(operands)}
        types = (type_key(v.type, numbers) for v in operands)
        return (*types, computation_key(operands, self.side_nodes, (self.y, *self.side)))


@dataclass(frozen=True)
class BlockParts:
    """A graph in parts.

    Attributes:
      graph: the graph.
      blocks: the part of each block, by its location.
      epilogue: what depends on several blocks, in order.
    """

    graph: Graph
    blocks: Mapping[str, BlockPart]
    epilogue: tuple[Node, ...]

    def finish(self, values: Mapping[Value, jax.Array], dtype: DType) -> dict[str, jax.Array]:
        """Return the outputs besides those of the blocks from the values that parts returned."""
        results = lower_values(list(self.epilogue), values, dtype)
        outputs = {part.y: output_name(loc) for loc, part in self.blocks.items()}
        return {
            name: finalize_output(results[v], v)
            for name, v in self.graph.outputs.items()
            if outputs.get(v) != name and v in results
        }


def cut_graph(graph: Graph, locations: Iterable[str]) -> BlockParts:
    """Return the parts of a graph that has an input and an output for each location."""
    depends: dict[Value, frozenset[str]] = {}
    values: dict[str, list[Value]] = {}
    for loc in locations:
        values[loc] = []
        depends[graph.inputs[input_name(loc)]] = frozenset((loc,))
    order = {node: i for i, node in enumerate(graph)}
    late: set[Node] = set()
    for node in graph:
        locs = frozenset[str]().union(*(depends.get(v, ()) for v in node.operands))
        depends.update(dict.fromkeys(node.results, locs))
        if len(locs) == 1:
            values[next(iter(locs))] += node.results
        elif locs:
            late.add(node)
    # Constants are computed again wherever they are used.
    for node in reversed(order):
        is_constant = not depends[node.results[0]]
        if is_constant and any(u in late for v in node.results for u in v.users):
            late.add(node)

    def needed(results: Iterable[Value]) -> tuple[Node, ...]:
        """Return the nodes that `results` are computed by, in order."""
        nodes: set[Node] = set()
        stack = [v.node for v in results]
        while stack:
            node = stack.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                stack += [v.node for v in node.operands]
                # What sets the extents of its types is needed, too.
                extents = (e for v in (*node.operands, *node.results) for e in v.type.extents)
                stack += [setter_of(e).node for e in extents]
        return tuple(sorted(nodes, key=order.__getitem__))

    outputs = {n: v for n, v in graph.outputs.items() if n not in set(map(output_name, values))}
    wanted = set(outputs.values())
    blocks = {}
    for loc, computed in values.items():
        y = graph.outputs[output_name(loc)]
        side = tuple(v for v in computed if v in wanted or any(u in late for u in v.users))
        nodes = needed((y,)), needed((y, *side))
        blocks[loc] = BlockPart(graph.inputs[input_name(loc)], y, *nodes, side)
    return BlockParts(graph, blocks, tuple(sorted(late, key=order.__getitem__)))
