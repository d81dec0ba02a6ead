"""How the part of a block is run: on whole arrays, with hints for a mesh, or shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from moecc.errors import InputError
from moecc.ir.graph import Value
from moecc.ir.mesh import Mesh, mesh_of
from moecc.sharding.layout import Layout
from moecc.types import DTYPES, F32, DType
from moecc_backends.jaxpr.graph import Part, Parts
from moecc_backends.jaxpr.jaxprs import AnyArray, evaluate, is_literal, scan_sizes
from moecc_backends.jaxpr.scopes import UNKNOWN, Frame, Scope, Step, Val
from moecc_backends.jaxpr.survey import Site
from moecc_backends.xla.lower.function import finalize_output, lower_values
from moecc_backends.xla.lower.mesh import GspmdLowering
from moecc_backends.xla.mesh.specs import spec
from moecc_backends.xla.trace.context import (
    DEFAULTS,
    DIRECT,
    DeviceView,
    Interceptor,
    Options,
)
from moecc_backends.xla.trace.typed_jax import PyTree, manual_axes, varies
from moecc_backends.xla.trace.values import Named

PartArrays = Mapping[Value, jax.Array]
Made = tuple[jax.Array, tuple[jax.Array, ...]]
"""The output ``[*tokens, embed]`` of a part, and the other values that it returns."""


@dataclass(frozen=True)
class Execution:
    """How parts are run.

    Attributes:
      options: what is chosen for the lowering.
      mesh: the devices of the mesh that the graph lies on; or that XLA's partitioner has.
    """

    options: Options = DEFAULTS
    mesh: jax.sharding.Mesh | None = None

    def run(self, part: Part, arrays: PartArrays, dtype: DType, *, side: bool) -> Made:
        """Return what a part makes of its input and parameters.

        Args:
          part: the part.
          arrays: its input, ``[*tokens, embed]``, its parameters and what else it takes.
          dtype: the type to compute in.
          side: whether the other values are wanted.

        Raises:
          InputError: the graph lies on a mesh, and no devices were given, or others.
        """
        own = mesh_of(part.x.graph)
        if own is None:
            return self._lowered(part, arrays, dtype, side, interceptor=self._hints(part))
        if set(own.names) <= manual_axes():
            return self._lowered(part, arrays, dtype, side, view=DeviceView(own))
        return self._mapped(part, arrays, dtype, side, own)

    def _hints(self, part: Part) -> Interceptor:
        """Return what holds values to a layout of the mesh, where there is a mesh."""
        if self.mesh is None or set(self.mesh.axis_names) & manual_axes():
            return DIRECT
        experts = next((v.type["expert"].size for v in part.params if "expert" in v.type), 0)
        assert isinstance(experts, int), "the number of experts is known"
        grid = Mesh(tuple((n, int(s)) for n, s in self.mesh.shape.items()))
        return GspmdLowering(self.mesh, Layout(grid, experts))

    def _lowered(
        self,
        part: Part,
        arrays: PartArrays,
        dtype: DType,
        side: bool,
        *,
        view: DeviceView | None = None,
        interceptor: Interceptor = DIRECT,
    ) -> Made:
        nodes = list(part.side_nodes if side else part.nodes)
        used = {v for n in nodes for v in n.operands} | {part.x}
        given = _alike({v: a for v, a in arrays.items() if v in used})
        values = lower_values(nodes, given, dtype, self.options, view, interceptor)
        y = values[part.y]
        assert isinstance(y, Named), "rows are combined"
        others = tuple(finalize_output(values[v], v) for v in part.side) if side else ()
        return y.to(part.x.type.names).array, others

    def _mapped(self, part: Part, arrays: PartArrays, dtype: DType, side: bool, own: Mesh) -> Made:
        """Run a part that lies on a mesh, shard by shard, with the collectives of its graph."""
        found = "none" if self.mesh is None else ",".join(
            f"{n}:{s}" for n, s in self.mesh.shape.items()
        )  # fmt: skip
        if self.mesh is None or found != str(own):
            raise InputError(
                "the blocks lie on a mesh of devices",
                expected=f"moe(function, mesh=…) with the mesh {own}",
                found=found,
            )
        values = list(arrays)
        view = DeviceView(own)

        def one(*given: jax.Array) -> Made:
            local = dict(zip(values, given, strict=True))
            y, others = self._lowered(part, local, dtype, side, view=view)
            settled = (view.settled(a, v.type) for a, v in zip(others, part.side, strict=False))
            return view.settled(y, part.y.type), tuple(settled)

        order = {a.name: a for a in part.y.type.axes}
        result = part.y.type.with_axes(order[n] for n in part.x.type.names)
        mapped = jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=tuple(spec(v.type) for v in values),
            out_specs=(spec(result), tuple(spec(v.type) for v in part.side) if side else ()),
            check_vma=True,
        )
        made: Made = mapped(*arrays.values())
        return made


def _alike(arrays: PartArrays) -> PartArrays:
    """Return arrays that all differ along the mesh axes along which any does.

    In a `shard_map` of the user tokens differ from device to device, and copies of experts do not.
    """
    axes = frozenset[str]().union(*map(varies, arrays.values()))
    return {v: DeviceView().varying(a, axes) for v, a in arrays.items()} if axes else arrays


# Run a function with its blocks replaced: every other equation as it stands.
#
# Loops, branches and checkpoints that hold blocks are built again around what is replaced; the
# rest
# of them, and every other equation, is evaluated from the jaxpr of the user's function.

Arrays = list[AnyArray]
Weights = dict[int, tuple[AnyArray, ...]]
"""The arrays of the parameters of a part by the number of its site."""

Side = dict[int, tuple[AnyArray, ...]]
"""What parts return besides their outputs, by the number of the site."""


@dataclass(frozen=True)
class Replacement:
    """What stands for a block.

    Attributes:
      number: of the site.
      site: the block.
      part: what it became; of several blocks in a loop, the first.
    """

    number: int
    site: Site
    part: Part


@dataclass
class Program:
    """A function, ready to run.

    Attributes:
      scope: the function.
      at: what stands for blocks, by the step that makes their result.
      gone: the steps that are not run.
      execution: how parts are run.
      extra: further inputs of the graph, by name.
      side: whether parts return their other values.
    """

    scope: Scope
    at: Mapping[Step, Replacement]
    gone: set[Step]
    execution: Execution
    extra: Mapping[str, AnyArray] = field(default_factory=dict)
    side: bool = False
    _holders: set[Step] = field(default_factory=set)

    def __post_init__(self) -> None:
        for replacement in self.at.values():
            self._holders.update(replacement.site.island.scope.owners)

    def run(self, given: Sequence[AnyArray], weights: Weights) -> tuple[Arrays, Side]:
        """Return the results of the function, and what parts return besides.

        Args:
          given: the arguments; None for leaves that are gone.
          weights: the parameters of the parts; those of blocks in loops stacked.
        """
        return self._scope(self.scope, given, weights)

    def _scope(
        self, scope: Scope, given: Sequence[AnyArray], weights: Weights
    ) -> tuple[Arrays, Side]:
        env: dict[Val, AnyArray] = dict(zip(scope.inputs, given, strict=True))
        side: Side = {}
        waiting: list[Step] = []
        for step in scope.steps:
            if step in self.at:
                self._evaluate(waiting, env)
                side |= self._replace(self.at[step], env, weights)
            elif step in self.gone:
                continue
            elif step in self._holders:
                self._evaluate(waiting, env)
                side |= self._rebuild(step, env, weights)
            else:
                if waiting and waiting[-1].frame is not step.frame:
                    self._evaluate(waiting, env)
                waiting.append(step)
        self._evaluate(waiting, env)
        return [_value(env, v) for v in scope.outputs], side

    def _evaluate(self, steps: list[Step], env: dict[Val, AnyArray]) -> None:
        """Evaluate equations as they stand, and forget them."""
        if not steps:
            return
        frame, mine = steps[0].frame, set(steps)
        given: dict[AnyArray, AnyArray] = {}
        for step in steps:
            for atom, value in zip(step.equation.invars, step.inputs, strict=True):
                if not is_literal(atom) and value.step not in mine:
                    given[atom] = _value(env, value)
        wanted = [v for s in steps for v in s.outputs if _leaves(v, mine)]
        names = _variables(frame, steps)
        made = evaluate([s.equation for s in steps], given, [names[v] for v in wanted], frame.jaxpr)
        env.update(zip(wanted, made, strict=True))
        steps.clear()

    def _replace(self, made: Replacement, env: dict[Val, AnyArray], weights: Weights) -> Side:
        island, part = made.site.island, made.part
        x = jnp.moveaxis(jnp.asarray(_value(env, island.x)), island.outer, -1)
        tokens = _as_tokens(x.shape[:-1], len(part.x.type) - 1)
        arrays = {part.x: x.reshape(*tokens, x.shape[-1])}
        arrays |= dict(zip(part.params, weights[made.number], strict=True))
        arrays |= {v: _fitting(self.extra[v.name], v, tokens) for v in part.extra}
        y, side = self.execution.run(part, arrays, dtype_of(x), side=self.side)
        whole = jnp.moveaxis(y.reshape(x.shape), -1, island.outer)
        env[island.output] = whole.transpose(island.order).astype(island.output.aval.dtype)
        return {made.number: side} if self.side else {}

    # --- loops and branches around blocks

    def _rebuild(self, step: Step, env: dict[Val, AnyArray], weights: Weights) -> Side:
        given = [_value(env, v) if _is_there(env, v) else None for v in step.inputs]
        inner = {n: w for n, w in weights.items() if step in self._site(n).island.scope.owners}
        made, side = _REBUILD[step.name](self, step, given, inner)
        env.update(zip(step.outputs, made, strict=True))
        return side

    def _site(self, number: int) -> Site:
        return next(r.site for r in self.at.values() if r.number == number)

    def scan(self, step: Step, given: Arrays, weights: Weights) -> tuple[Arrays, Side]:
        """A scan: weights that it slices are stacked; what parts return besides is, too."""
        consts, carried = scan_sizes(step.params)
        sliced = {n: w for n, w in weights.items() if step in self._site(n).loops}
        fixed = {n: w for n, w in weights.items() if n not in sliced}
        body = step.bodies[0]

        def one(carry: Arrays, each: tuple[Arrays, Weights]) -> tuple[Arrays, tuple[Arrays, Side]]:
            xs, own = each
            made, side = self._scope(body, [*given[:consts], *carry, *xs], {**fixed, **own})
            return made[:carried], (made[carried:], side)

        first, stacked = given[consts : consts + carried], given[consts + carried :]
        options = {n: step.params[n] for n in ("length", "reverse", "unroll")}
        last, (ys, side) = jax.lax.scan(one, first, (stacked, sliced), **options)
        return [*last, *ys], side

    def checkpoint(self, step: Step, given: Arrays, weights: Weights) -> tuple[Arrays, Side]:
        """A checkpoint, with its policy."""
        body = step.bodies[0]

        def inner(arrays: Arrays, own: Weights) -> tuple[Arrays, Side]:
            return self._scope(body, arrays, own)

        options = {n: step.params[n] for n in ("prevent_cse", "policy")}
        made: tuple[Arrays, Side] = jax.checkpoint(inner, **options)(given, weights)
        return made

    def branches(self, step: Step, given: Arrays, weights: Weights) -> tuple[Arrays, Side]:
        """Branches: what a branch without a block does not return is zero."""
        index, *operands = given

        def branch(body: Scope) -> AnyArray:
            return lambda arrays, own: self._scope(body, arrays, own)

        plain = [branch(body) for body in step.bodies]
        shapes: dict[int, AnyArray] = {}
        for one in plain:
            shapes |= jax.eval_shape(one, operands, weights)[1]

        def padded(one: AnyArray) -> AnyArray:
            def run(arrays: Arrays, own: Weights) -> tuple[Arrays, Side]:
                made, side = one(arrays, own)
                zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                return made, {**zeros, **side}

            return run

        made: tuple[Arrays, Side] = jax.lax.switch(index, [*map(padded, plain)], operands, weights)
        return made

    def loop(self, step: Step, given: Arrays, weights: Weights) -> tuple[Arrays, Side]:
        """A loop of unknown length, which has no gradient: its blocks return nothing besides."""
        first, second = step.params["cond_nconsts"], step.params["body_nconsts"]
        condition, body = step.bodies

        def proceed(carry: Arrays) -> AnyArray:
            return self._scope(condition, [*given[:first], *carry], weights)[0][0]

        def one(carry: Arrays) -> Arrays:
            return self._scope(body, [*given[first : first + second], *carry], weights)[0]

        made: Arrays = jax.lax.while_loop(proceed, one, given[first + second :])
        return made, {}


_REBUILD = {
    "scan": Program.scan,
    "while": Program.loop,
    "cond": Program.branches,
    "remat2": Program.checkpoint,
    "checkpoint": Program.checkpoint,
    "remat": Program.checkpoint,
}


def _is_there(env: Mapping[Val, AnyArray], value: Val) -> bool:
    return value.const is not UNKNOWN or env.get(value) is not None


def _value(env: Mapping[Val, AnyArray], value: Val) -> AnyArray:
    if value.const is not UNKNOWN:
        is_key = jnp.issubdtype(value.aval.dtype, jax.dtypes.extended)
        return value.const if is_key else jnp.asarray(value.const, value.aval.dtype)
    return env[value]


def _leaves(value: Val, steps: set[Step]) -> bool:
    """Whether something else than `steps` uses a value."""
    return value.is_returned or any(user not in steps for user in value.users)


def _variables(frame: Frame, steps: Sequence[Step]) -> dict[Val, AnyArray]:
    """Return the variables of what `steps` define."""
    return {v: a for s in steps for v, a in zip(s.outputs, s.equation.outvars, strict=True)}


def _as_tokens(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return a shape of tokens as one of `rank` axes: leading ones joined, or ones put behind."""
    if len(shape) <= rank:
        return (*shape, *[1] * (rank - len(shape)))
    first = len(shape) - rank + 1
    joined = 1
    for size in shape[:first]:
        joined *= size
    return (joined, *shape[first:])


def _fitting(array: AnyArray, value: Value, tokens: tuple[int, ...]) -> AnyArray:
    """Return a further input in the shape of the tokens of a block, where it has as many."""
    if not value.type.axes:
        return array
    return jnp.asarray(array).reshape(tokens)


def dtype_of(x: AnyArray) -> DType:
    """Return the element type of an array as the IR has it."""
    return next(d for d in DTYPES.values() if d.numpy == x.dtype)


# Losses and metrics of converted functions: joined over where blocks run, added to a loss.

AUXILIARY = "loss.auxiliary"
"""The output that `add-losses` makes of all losses of routers."""

MODEL = "loss.model"
"""The result of the user's loss alone."""


def joined(
    parts: Parts,
    of_sites: Mapping[int, Sequence[Part]],
    replaced: Sequence[Replacement],
    side: Side,
) -> dict[str, AnyArray]:
    """Return the losses and metrics of what parts returned besides their outputs.

    A block that runs several times has the mean of what it returned; one that does not run, zero.

    Args:
      parts: all blocks.
      of_sites: the blocks of each site, by its number.
      replaced: the sites.
      side: what their parts returned, loops in front.
    """
    values: dict[Value, list[AnyArray]] = {}
    for one in replaced:
        scans = [s for s in one.site.island.scope.owners if s.name == "scan"]
        for at, array in enumerate(side.get(one.number, ())):
            rows = _rows(array, scans, one.site)
            for row, part in zip(rows, of_sites[one.number], strict=True):
                values.setdefault(part.side[at], []).append(row)
    means: dict[Value, AnyArray] = {
        v: rows[0] if len(rows) == 1 else sum(rows) / len(rows) for v, rows in values.items()
    }
    for part in parts.blocks.values():
        for value in part.side:
            if value not in means:
                means[value] = _zero(value)
    return parts.finish(means, F32)


def _rows(array: AnyArray, scans: Sequence[Step], site: Site) -> list[AnyArray]:
    """Return what each block of a site returned: the mean over loops that run the same block."""
    others = tuple(i for i, s in enumerate(scans) if s not in site.loops)
    mean = jnp.mean(array, axis=others) if others else array
    if not site.loops:
        return [mean]
    flat = mean.reshape(site.count, *mean.shape[len(site.loops) :])
    return [flat[i] for i in range(site.count)]


def _zero(value: Value) -> AnyArray:
    return jnp.zeros([s if isinstance(s, int) else 1 for s in value.type.sizes], jnp.float32)


def with_losses(result: PyTree, found: dict[str, AnyArray]) -> AnyArray:
    """Return a result and the losses and metrics `found`.

    A scalar, or the first of a tuple if it is one, is the model's loss: `AUXILIARY` is added to it.
    """
    auxiliary = found.get(AUXILIARY)
    if isinstance(result, tuple) and result and _is_loss(result[0]):
        loss, *rest = result
        more = rest[0] if len(rest) == 1 else tuple(rest)
        return _total(loss, auxiliary), (more, {MODEL: loss, **found})
    if _is_loss(result):
        return _total(result, auxiliary), {MODEL: result, **found}
    return result, found


def _is_loss(result: PyTree) -> bool:
    is_number = hasattr(result, "shape") and result.shape == ()
    return is_number and bool(jnp.issubdtype(result.dtype, jnp.floating))


def _total(loss: AnyArray, auxiliary: AnyArray) -> AnyArray:
    return loss if auxiliary is None else loss + auxiliary.astype(loss.dtype)
