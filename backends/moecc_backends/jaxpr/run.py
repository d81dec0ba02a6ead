"""Run a function with its blocks replaced: every other equation as it stands.

Loops, branches and checkpoints that hold blocks are built again around what is replaced; the rest
of them, and every other equation, is evaluated from the jaxpr of the user's function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moecc.errors import InputError, Problem, raise_problems
from moecc.ir.conventions import AUXILIARY
from moecc.ir.graph import Value
from moecc.ir.mesh import Mesh, mesh_of
from moecc.sharding.layout import Layout
from moecc.types import F32, DType
from moecc_backends.jaxpr.blocks import same_in
from moecc_backends.jaxpr.graph import BlockPart, BlockParts
from moecc_backends.jaxpr.scopes import (
    CHECKPOINTS,
    UNKNOWN,
    Equation,
    JaxprScope,
    ParamTree,
    TracedFunction,
    Variable,
    is_array,
    is_key,
    leaves_of,
    trace_function,
)
from moecc_backends.jaxpr.storage import ParamSlot, ParamStorage
from moecc_backends.jaxpr.survey import (
    BlockInstance,
    BlockKey,
    BlockSite,
    equations_of,
    leaf_uses,
    skipped_equations,
    survey_blocks,
)
from moecc_backends.jaxpr.views import (
    AnyArray,
    AnyArrays,
    TreeLeaf,
    evaluate,
    function_line,
    is_literal,
    scan_sizes,
    shape_of,
)
from moecc_backends.xla.lower.function import GspmdLowering, finalize_output, lower_values, spec
from moecc_backends.xla.trace.context import DEFAULTS, DIRECT, DeviceView, Interceptor, Options
from moecc_backends.xla.trace.host_arrays import check_keys
from moecc_backends.xla.trace.values import (
    Function,
    Named,
    PyTree,
    dtype_of,
    is_float,
    manual_axes,
    varies,
)

PartArrays = Mapping[Value, Array]
PartResult = tuple[Array, tuple[Array, ...]]
"""The output ``[*tokens, embed]`` of a part, and the other values that it returns."""

Arrays = list[AnyArray]
ParamArrays = dict[int, tuple[AnyArray, ...]]
"""The arrays of the parameters of a part by the number of its site."""

SideArrays = dict[int, tuple[AnyArray, ...]]
"""What parts return besides their outputs, by the number of the site."""

Results = tuple[Arrays, SideArrays]
"""The results of a scope, and the further values of the parts in it."""


@dataclass(frozen=True)
class Execution:
    """How the part of a block is run: on whole arrays, with hints for a mesh, or shard by shard.

    Attributes:
      options: what is chosen for the lowering.
      mesh: the devices of the mesh that the graph lies on; or that XLA's partitioner has.
    """

    options: Options = DEFAULTS
    mesh: jax.sharding.Mesh | None = None

    def run(self, part: BlockPart, arrays: PartArrays, dtype: DType, *, side: bool) -> PartResult:
        """Return what a part makes of its input and parameters.

        Args:
          part: the part.
          arrays: its input, ``[*tokens, embed]``, its parameters and what else it takes.
          dtype: the type to compute in.
          side: whether the other values are wanted.

        Raises:
          InputError: the graph lies on a mesh, and no devices were given, or others.
        """
        mesh, manual = mesh_of(part.x.graph), manual_axes()
        lowered = partial(self._lowered, part, dtype, side)
        if mesh is None:
            if self.mesh is None or set(self.mesh.axis_names) & manual:
                return lowered(arrays)
            owned = (v.type["expert"] for v in part.params if "expert" in v.type)
            experts = next((axis.fixed_size for axis in owned), 0)
            grid = Mesh(tuple((n, int(s)) for n, s in self.mesh.shape.items()))
            return lowered(arrays, interceptor=GspmdLowering(self.mesh, Layout(grid, experts)))
        if set(mesh.names) <= manual:
            return lowered(arrays, view=DeviceView(mesh))
        # Shard by shard, with the collectives of the graph.
        shape = self.mesh.shape.items() if self.mesh is not None else ()
        devices = ",".join(f"{n}:{s}" for n, s in shape) or "none"
        if devices != str(mesh):
            raise InputError(
                "the blocks lie on a mesh of devices",
                expected=f"moe(function, mesh=…) with the mesh {mesh}",
                found=devices,
            )

        def on_device(*shards: Array) -> PartResult:
            view = DeviceView(mesh)
            y, side_arrays = lowered(dict(zip(arrays, shards, strict=True)), view=view)
            pairs = zip(side_arrays, part.side, strict=False)
            return view.settled(y, part.y.type), tuple(view.settled(a, v.type) for a, v in pairs)

        result = part.y.type.with_axes(part.y.type[n] for n in part.x.type.names)
        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=tuple(spec(v.type) for v in arrays),
            out_specs=(spec(result), tuple(spec(v.type) for v in part.side) if side else ()),
            check_vma=True,
        )
        output: PartResult = mapped(*arrays.values())
        return output

    def _lowered(
        self,
        part: BlockPart,
        dtype: DType,
        side: bool,
        arrays: PartArrays,
        *,
        view: DeviceView | None = None,
        interceptor: Interceptor = DIRECT,
    ) -> PartResult:
        nodes = list(part.side_nodes if side else part.nodes)
        used = {v for n in nodes for v in n.operands} | {part.x}
        operands = {v: a for v, a in arrays.items() if v in used}
        # In a `shard_map` of the user tokens differ from device to device, and copies of experts
        # do not: all differ along the mesh axes along which any does.
        axes = varies(*operands.values())
        operands = {v: DeviceView().varying(a, axes) for v, a in operands.items()}
        values = lower_values(nodes, operands, dtype, self.options, view, interceptor)
        y = values[part.y]
        assert isinstance(y, Named), "rows are combined"
        side_arrays = tuple(finalize_output(values[v], v) for v in part.side) if side else ()
        return y.to(part.x.type.names).array, side_arrays


class Replacement(NamedTuple):
    """What stands for a block.

    Attributes:
      number: the number of the site.
      site: the block.
      parts: what the blocks of the site became: of a loop, alike.
    """

    number: int
    site: BlockSite
    parts: Sequence[BlockPart]


@dataclass
class RewrittenFunction:
    """A function whose blocks are replaced, ready to run.

    Attributes:
      replacements: what stands for blocks.
      gone: the equations that are not run.
      execution: how parts are run.
      extra: further inputs of the graph, by name.
      side: whether parts return their other values.
    """

    replacements: Sequence[Replacement]
    gone: set[Equation]
    execution: Execution
    extra: AnyArrays
    side: bool

    def __post_init__(self) -> None:
        self._at = {r.site.slice.equations[-1]: r for r in self.replacements}
        self._sites = {r.number: r.site for r in self.replacements}
        self._holders = {e for site in self._sites.values() for e in site.slice.scope.owners}

    def run(self, scope: JaxprScope, inputs: Sequence[AnyArray], params: ParamArrays) -> Results:
        """Return the results of a scope, and the further values of the parts in it.

        Args:
          scope: the function, or a body in it.
          inputs: the arguments; None for leaves that are gone.
          params: the parameters of the parts; those of blocks in loops stacked.
        """
        values: dict[Variable, AnyArray] = dict(zip(scope.inputs, inputs, strict=True))
        side: SideArrays = {}
        waiting: list[Equation] = []
        for equation in scope.equations:
            if equation in self._at:
                _evaluate(waiting, values)
                side |= self._replace(self._at[equation], values, params)
            elif equation in self.gone:
                continue
            elif equation in self._holders:
                _evaluate(waiting, values)
                operands = [_value(values, v, None) for v in equation.inputs]
                inner = {
                    n: arrays
                    for n, arrays in params.items()
                    if equation in self._sites[n].slice.scope.owners
                }
                results, more = _REBUILD[equation.name](self, equation, operands, inner)
                values.update(zip(equation.outputs, results, strict=True))
                side |= more
            else:
                if waiting and waiting[-1].frame is not equation.frame:
                    _evaluate(waiting, values)
                waiting.append(equation)
        _evaluate(waiting, values)
        return [_value(values, v) for v in scope.outputs], side

    def _replace(
        self, replacement: Replacement, values: dict[Variable, AnyArray], params: ParamArrays
    ) -> SideArrays:
        block, part = replacement.site.slice, replacement.parts[0]
        x = jnp.moveaxis(jnp.asarray(_value(values, block.x)), block.outer, -1)
        # Leading axes of tokens are joined, or missing ones put behind.
        *sizes, width = x.shape
        missing = len(part.x.type) - 1 - len(sizes)
        tokens = (
            [*sizes, *[1] * missing]
            if missing >= 0
            else [prod(sizes[: 1 - missing]), *sizes[1 - missing :]]
        )
        arrays = {part.x: x.reshape(*tokens, width)}
        arrays |= dict(zip(part.params, params[replacement.number], strict=True))
        for v in part.extra:
            array = self.extra[v.name]
            arrays[v] = jnp.asarray(array).reshape(tokens) if v.type.axes else array
        y, side = self.execution.run(part, arrays, dtype_of(x), side=self.side)
        output = jnp.moveaxis(y.reshape(x.shape), -1, block.outer)
        values[block.output] = output.transpose(block.order).astype(block.output.aval.dtype)
        return {replacement.number: side} if self.side else {}

    # Loops and branches around blocks.

    def scan(self, equation: Equation, operands: Arrays, params: ParamArrays) -> Results:
        """Scan: weights that it slices are stacked; what parts return besides is, too."""
        consts, carried = scan_sizes(equation.params)
        sliced = {n: arrays for n, arrays in params.items() if equation in self._sites[n].loops}
        fixed = {n: arrays for n, arrays in params.items() if n not in sliced}

        def step(carry: Arrays, rows: tuple[Arrays, ParamArrays]) -> tuple[Arrays, Results]:
            inputs = [*operands[:consts], *carry, *rows[0]]
            results, side = self.run(equation.bodies[0], inputs, {**fixed, **rows[1]})
            return results[:carried], (results[carried:], side)

        first, stacked = operands[consts : consts + carried], operands[consts + carried :]
        options = {n: equation.params[n] for n in ("length", "reverse", "unroll")}
        last, (results, side) = lax.scan(step, first, (stacked, sliced), **options)
        return [*last, *results], side

    def checkpoint(self, equation: Equation, operands: Arrays, params: ParamArrays) -> Results:
        """Checkpoint, with its policy."""
        options = {n: equation.params[n] for n in ("prevent_cse", "policy")}
        body = partial(self.run, equation.bodies[0])
        results: Results = jax.checkpoint(body, **options)(operands, params)
        return results

    def branches(self, equation: Equation, operands: Arrays, params: ParamArrays) -> Results:
        """Branch: what a branch without a block does not return is zero."""
        index, *arguments = operands
        bodies = [partial(self.run, body) for body in equation.bodies]
        shapes: dict[int, AnyArray] = {}
        for body in bodies:
            shapes |= jax.eval_shape(body, arguments, params)[1]

        def padded(body: AnyArray, arrays: Arrays, inner: ParamArrays) -> Results:
            results, side = body(arrays, inner)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return results, {**zeros, **side}

        branches = [partial(padded, body) for body in bodies]
        results: Results = lax.switch(index, branches, arguments, params)
        return results

    def loop(self, equation: Equation, operands: Arrays, params: ParamArrays) -> Results:
        """Loop with an unknown length, which has no gradient: its blocks return nothing besides."""
        first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        condition, body = equation.bodies

        def proceed(carry: Arrays) -> AnyArray:
            return self.run(condition, [*operands[:first], *carry], params)[0][0]

        def step(carry: Arrays) -> Arrays:
            return self.run(body, [*operands[first : first + second], *carry], params)[0]

        results: Arrays = lax.while_loop(proceed, step, operands[first + second :])
        return results, {}


_REBUILD = {
    "scan": RewrittenFunction.scan,
    "while": RewrittenFunction.loop,
    "cond": RewrittenFunction.branches,
    **dict.fromkeys(CHECKPOINTS, RewrittenFunction.checkpoint),
}


def _evaluate(equations: list[Equation], values: dict[Variable, AnyArray]) -> None:
    """Evaluate equations of one jaxpr as they stand, and forget them."""
    if not equations:
        return
    inside = set(equations)
    inputs: dict[AnyArray, AnyArray] = {}
    results: dict[Variable, AnyArray] = {}
    for equation in equations:
        for atom, variable in zip(equation.eqn.invars, equation.inputs, strict=True):
            if not is_literal(atom) and variable.equation not in inside:
                inputs[atom] = _value(values, variable)
        for atom, variable in zip(equation.eqn.outvars, equation.outputs, strict=True):
            if variable.is_returned or any(user not in inside for user in variable.users):
                results[variable] = atom
    eqns = [e.eqn for e in equations]
    arrays = evaluate(eqns, inputs, list(results.values()), equations[0].frame.jaxpr)
    values.update(zip(results, arrays, strict=True))
    equations.clear()


def _value(values: Mapping[Variable, AnyArray], variable: Variable, *default: None) -> AnyArray:
    """Return the value of a variable, or the default where there is one."""
    if variable.const is UNKNOWN:
        return values.get(variable, *default) if default else values[variable]
    dtype = variable.aval.dtype
    return variable.const if is_key(dtype) else jnp.asarray(variable.const, dtype)


# Losses and metrics: joined over where blocks run, added to a loss.

MODEL = "loss.model"
"""The result of the user's loss alone."""


def joined_losses(
    parts: BlockParts, replacements: Sequence[Replacement], side: SideArrays
) -> dict[str, AnyArray]:
    """Return the losses and metrics of what parts returned besides their outputs.

    A block that runs several times has the mean of what it returned; one that does not run, zero.

    Args:
      parts: all blocks.
      replacements: the sites.
      side: what their parts returned, loops in front.
    """
    values: dict[Value, list[AnyArray]] = {}
    for number, site, parts_of_site in replacements:
        scans = [e for e in site.slice.scope.owners if e.name == "scan"]
        repeated = tuple(i for i, e in enumerate(scans) if e not in site.loops)
        for at, array in enumerate(side.get(number, ())):
            mean = jnp.mean(array, axis=repeated) if repeated else array
            rows = mean.reshape(len(parts_of_site), *mean.shape[len(site.loops) :])
            for row, part in zip(rows, parts_of_site, strict=True):
                values.setdefault(part.side[at], []).append(row)
    means: dict[Value, AnyArray] = {v: sum(rows) / len(rows) for v, rows in values.items()}
    for value in (v for part in parts.blocks.values() for v in part.side if v not in means):
        shape = [s if isinstance(s, int) else 1 for s in value.type.sizes]
        means[value] = jnp.zeros(shape, jnp.float32)
    return parts.finish(means, F32)


def with_losses(result: PyTree, losses: dict[str, AnyArray]) -> AnyArray:
    """Return a result and the losses and metrics `losses`.

    A scalar, or the first of a tuple if it is one, is the model's loss: `AUXILIARY` is added to it.
    """
    is_tuple = isinstance(result, tuple) and bool(result)
    loss = result[0] if is_tuple else result
    is_scalar = hasattr(loss, "shape") and loss.shape == ()
    if not is_scalar or not is_float(loss.dtype):
        return result, losses
    auxiliary = losses.get(AUXILIARY)
    total = loss if auxiliary is None else loss + auxiliary.astype(loss.dtype)
    losses = {MODEL: loss, **losses}
    if not is_tuple:
        return total, losses
    more = result[1] if len(result) == 2 else tuple(result[1:])
    return total, (more, losses)


# One trace of a function on new parameters: its blocks found again, and run as they are now.

TREE, BESIDE = "params", "moe"
"""The keys of new parameters: the tree with experts in it, and the arrays beside the tree."""


@dataclass(frozen=True)
class ConversionState:
    """What every function of the same parameters needs to know of a conversion.

    Attributes:
      tree: the dense parameters.
      leaves: their leaves, those that weights can be read from.
      parts: the converted graph, block by block.
      instances: the blocks, converted or not.
      converted: the locations of those that the pipeline changed.
      storage: where their parameters lie.
    """

    tree: ParamTree
    leaves: Mapping[str, TreeLeaf]
    parts: BlockParts
    instances: Mapping[BlockKey, BlockInstance]
    converted: frozenset[str]
    storage: ParamStorage

    def parts_of(self, site: BlockSite) -> list[BlockPart]:
        """Return the parts of the blocks of a site; none if it is not converted."""
        instances = [self._instance(site, key) for key in site.keys]
        parts = [self.parts.blocks[i.loc] for i in instances if i and i.loc in self.converted]
        return parts if len(parts) == len(instances) else []

    def _instance(self, site: BlockSite, key: BlockKey) -> BlockInstance | None:
        """Return a block of the conversion, traced in another element type perhaps."""
        if key in self.instances:
            return self.instances[key]
        dtypes = {dtype_of(site.slice.x.aval), key[1][0].type.dtype}
        for (_, weights), instance in self.instances.items():
            identities = site.identity, instance.identity
            if weights == key[1] and any(same_in(*identities, dtype) for dtype in dtypes):
                return instance
        return None


@dataclass(frozen=True)
class ConvertedParams:
    """New parameters, taken apart: the leaves of the tree, and the arrays beside it."""

    leaves: AnyArrays
    beside: AnyArrays

    @classmethod
    def of(
        cls, tree: ParamTree, storage: ParamStorage, params: PyTree, where: str | None = None
    ) -> ConvertedParams:
        """Return `params` taken apart.

        In a `shard_map` of the user arrays are parts of those of the conversion.

        Args:
          tree: the dense parameters.
          storage: where the new ones lie.
          params: the new ones.
          where: the line of the function that takes them.

        Raises:
          InputError: they are not those of a conversion, or another tree, or an array is missing
            or has another shape.
        """
        is_pair = isinstance(params, Mapping) and set(params) == {TREE, BESIDE}
        if not is_pair or not isinstance(params[BESIDE], Mapping):
            raise InputError(
                "these are not the parameters of a conversion",
                where=where,
                expected=f"a dictionary of {TREE!r} and {BESIDE!r}, as `moe.params`",
                found=type(params).__name__,
            )
        converted = cls(tree.flatten(params[TREE], where), params[BESIDE])
        is_part = bool(manual_axes())
        problems = []
        for stored in storage.arrays:
            array = (converted.leaves if stored.in_tree else converted.beside).get(stored.key)
            expected = stored.weight.type.shape
            shape = tuple(array.shape) if array is not None and is_array(array) else None
            if shape is None or (len(shape) != len(expected) if is_part else shape != expected):
                key = f"{TREE if stored.in_tree else BESIDE} {stored.key}"
                at = f"{where}, {key}" if where else key
                actual = type(array).__name__ if shape is None else str(list(shape))
                words = "an array of the parameters has another shape than the conversion gave it"
                problems.append(Problem(words, at, str(list(expected)), actual))
        raise_problems(problems)
        return converted

    def array(self, slot: ParamSlot) -> AnyArray:
        """Return the array in which a parameter lies."""
        return self.leaves[slot.key] if slot.in_tree else self.beside[slot.key]

    def stacked(self, slots: Sequence[ParamSlot], lengths: tuple[int, ...]) -> AnyArray:
        """Return a parameter of blocks in loops, the loops in front; of one block as it is.

        Args:
          slots: where it lies for each block.
          lengths: how often each loop runs.
        """
        array = self.array(slots[0])
        is_stack = len({(s.key, s.in_tree) for s in slots}) == 1 and slots[0].row is not None
        if lengths and is_stack and [s.row for s in slots] == [*range(array.shape[0])]:
            return array.reshape(*lengths, *array.shape[1:])
        rows = [self.array(s) if s.row is None else self.array(s)[s.row] for s in slots]
        return jnp.stack(rows).reshape(*lengths, *rows[0].shape) if lengths else rows[0]


def call_converted(
    state: ConversionState,
    function: Function,
    execution: Execution,
    params: PyTree,
    arguments: tuple[tuple[AnyArray, ...], AnyArrays],
    extra: AnyArrays,
    *,
    losses: bool,
) -> AnyArray:
    """Return the result of a function on new parameters.

    Args:
      state: the state of the conversion.
      function: the user's function of dense parameters.
      execution: how parts are run.
      params: the new parameters.
      arguments: the other arguments, by position and by name.
      extra: further inputs of the graph.
      losses: whether losses and metrics are returned, too.

    Raises:
      InputError: the parameters do not fit, or the function cannot be traced, or it uses what
        is an expert's now in another way.
    """
    storage = state.storage
    converted = ConvertedParams.of(state.tree, storage, params, function_line(function))
    avals = {}
    for name, leaf in converted.leaves.items():
        dense = state.leaves[name] if name in storage.gone else leaf
        dtype = dense.dtype.numpy if leaf is None else leaf.dtype
        avals[name] = shape_of(dense.shape, dtype)
    leaves = leaves_of(avals)
    leaves |= {n: leaf for n, leaf in state.leaves.items() if leaf.shape == avals[n].shape}
    traced = trace_function(function, state.tree, avals, leaves, arguments)
    replacements = _replacements(state, traced)
    # Raise InputError where further inputs of the graph are missing or unknown.
    needed = {v.name: v for r in replacements for v in r.parts[0].extra}
    if set(needed) != set(extra):
        raise InputError(
            "the graph of the blocks takes other inputs than were given",
            expected=f"moe_inputs={{{', '.join(f'{n!r}: …' for n in needed)}}}",
            found=", ".join(extra) or "none",
            hint="; ".join(f"{n}: {v.type}" for n, v in needed.items()) or None,
        )
    check_keys({name: extra[name] for name, v in needed.items() if v.type.dtype.kind == "key"})
    rewritten = RewrittenFunction(
        replacements,
        skipped_equations(traced.scope, equations_of(r.site for r in replacements)),
        execution,
        extra,
        side=losses,
    )
    weights = {}
    for r in replacements:
        slots = [[storage.slots[p.name] for p in part.params] for part in r.parts]
        columns = zip(*slots, strict=True)
        weights[r.number] = tuple(converted.stacked(each, r.site.lengths) for each in columns)
    arrays = [None if n in storage.gone else converted.leaves[n] for n in state.tree.array_names]
    results, side = rewritten.run(traced.scope, [*arrays, *traced.arrays], weights)
    result = jax.tree_util.tree_unflatten(traced.treedef, results)
    if not losses:
        return result
    return with_losses(result, joined_losses(state.parts, replacements, side))


def _replacements(state: ConversionState, traced: TracedFunction) -> list[Replacement]:
    """Return what stands for the blocks of a function; every expert must be of one of them."""
    survey = survey_blocks(traced.scope)
    pairs = [(site, state.parts_of(site)) for site in survey.sites]
    replacements = [Replacement(n, site, parts) for n, (site, parts) in enumerate(pairs) if parts]
    inside = equations_of(r.site for r in replacements)
    gone = state.storage.gone
    uses = [u for u in leaf_uses(traced.scope, inside) if u.view.leaf.name in gone]
    if uses:
        reasons = {n: m.reason for m in survey.misses for n in m.weights}
        raise InputError(
            Problem(
                f"`{use.view.leaf.name}` holds the weights of experts now, and is used "
                "otherwise here",
                where=str(use),
                found=reasons.get(use.view.leaf.name),
                hint="use it in its block alone, as the converted function does",
            )
            for use in uses
        )
    return replacements
