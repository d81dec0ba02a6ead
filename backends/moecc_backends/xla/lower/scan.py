"""Lowering of repetition: a body that is compiled once, whatever the number of runs.

Under rematerialisation a run is a checkpoint: what is between two runs is kept, and for the
gradient the run is computed again.  Where a run is a block of several layers, those that are alike
are a loop within it, which is compiled once.  Each of them is a checkpoint, too, but under
``block``: the intermediates of one of them alone are alive at a time then, and they are computed
once more for that.

Without rematerialisation what the gradient needs of the values of the graph is kept, and what is
dear of that which lowerings have between them.  Parameters are gathered again all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp

from moecc.ir.attributes import IndexAttrs, ScanAttrs, StackAttrs
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.remat_names import DEFAULT
from moecc.ir.table.repetition import repetitions
from moecc_backends.xla.lower.inner_loops import LayerLoop, pieces_of
from moecc_backends.xla.lower.precision import is_precise_param
from moecc_backends.xla.trace.arrays import lifted
from moecc_backends.xla.trace.context import DIRECT, Context, lower_nodes, lowering
from moecc_backends.xla.trace.masters import Master, cast_all
from moecc_backends.xla.trace.typed_jax import Function, barrier
from moecc_backends.xla.trace.values import Named, Operand, Uncast

Arrays = tuple[jax.Array, ...]
Slices = tuple[jax.Array | Master, ...]
Step = Callable[[Arrays, Slices], tuple[Arrays, Arrays]]
Remembering = Callable[..., Function]

_CHEAP = frozenset({
    "all_gather", "all_gather_invariant", "pvary", "pcast", "transpose", "reshape", "squeeze",
    "broadcast_in_dim", "convert_element_type", "layout_constraint", "reduce_precision", "add",
    "sub", "mul", "div", "max", "min", "neg", "sign", "abs", "integer_pow", "pow", "exp", "exp2",
    "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt", "rsqrt", "square",
    "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite",
    "stop_gradient", "custom_jvp_call", "reduce_sum", "reduce_max", "optimization_barrier",
})  # fmt: skip
"""Primitives of jax whose results are made again from values of the graph: gathers of parameters,
and what XLA fuses into its user."""

_CASTS = frozenset({"reduce_precision", "convert_element_type", "optimization_barrier"})

UNROLLED_BYTES, UNROLLED_NODES = 1 << 24, 1024
"""On a CPU runs are compiled one by one that read at least so many bytes of stacked weights, and
have at most so many nodes together.  A loop copies the weights of each run out of the stack, and
their gradients into one: 15 % of a step with 30 M parameters in 6 layers, 5 % with 5 M.  Gradients
are there twice for that, before they are stacked."""

_WIDENINGS = 3
"""How often the type of a carry may widen before it must stay: bf16, f32, f64."""


def is_stacked(scan: Node, value: Value) -> bool:
    """Return whether each turn of the loop `scan` takes a slice of `value`."""
    attrs = ScanAttrs.of_node(scan)
    return value in scan.operands[attrs.carries : attrs.carries + attrs.stacked]


def is_cast_by_layer(value: Value) -> bool:
    """Return whether loops alone read the parameter `value`, slice by slice, and may cast it."""
    loops = bool(value.users) and all(user.body is not None for user in value.users)
    return loops and not is_precise_param(value) and all(is_stacked(u, value) for u in value.users)


@lowering("stack")
def _stack(ctx: Context, node: Node, *xs: Named) -> Operand:
    axes = xs[0].axes
    return Named(jnp.stack([x.to(axes).array for x in xs]), (StackAttrs.of_node(node).axis, *axes))


@lowering("index")
def _index(ctx: Context, node: Node, x: Operand) -> Operand:
    attrs = IndexAttrs.of_node(node)
    axis, at = attrs.axis, attrs.at

    def pick(full: Named) -> Named:
        rest = tuple(a for a in full.axes if a != axis)
        return Named(jnp.take(full.array, at, axis=full.axes.index(axis)), rest)

    return lifted(x, pick)


@lowering("scan")
def _scan(ctx: Context, node: Node, *operands: Named) -> tuple[Operand, ...]:
    attrs = ScanAttrs.of_node(node)
    body = node.body
    assert body is not None, "a scan has a body"
    carries, last = attrs.carries, attrs.carries + attrs.stacked
    axis, runs = repetitions(node.attrs)
    slices = [_leading(x, axis) for x in operands[carries:last]]
    captured = [x.array for x in operands[last:]]
    names = [x.axes for x in operands]
    names[carries:last] = [x.axes[1:] for x in slices]

    remembering = _remembering(node)
    in_loops = _KEEPING if attrs.remat == "block" else remembering
    inner = zip(body.inputs.values(), node.operands, strict=True)
    weights = {i for i, v in inner if v.is_param or v in ctx.weights}

    def run(carry: Arrays, now: Slices) -> tuple[Arrays, Arrays]:
        if ctx.view.mesh is not None:
            # On whole arrays XLA's partitioner would gather for the constraint.
            now = tuple(
                a.as_stored(ctx.options.target) if isinstance(a, Master) else a for a in now
            )
        given = zip((*carry, *cast_all(now), *captured), names, strict=True)
        within = replace(ctx, weights=set(weights))
        made = run_body(within, body, [Named(array, axes) for array, axes in given], in_loops)
        # A carry keeps the order of its axes from run to run.
        kept = tuple(m.to(n).array for m, n in zip(made[:carries], names[:carries], strict=True))
        return kept, tuple(m.array for m in made[carries:])

    initial = zip(operands[:carries], node.operands, strict=False)
    first = tuple(ctx.view.settled(x.array, v.type) for x, v in initial)
    # Within a loop nothing could be merged across the barrier that this would set.
    step = (remembering or _KEEPING)(run, prevent_cse=False)
    now = tuple(x.master if isinstance(x, Uncast) else x.array for x in slices)
    unroll = remembering is None and _is_written_out(ctx, body, now, runs)
    carry, made = _repeat(step, first, now, runs, unroll)
    whole = [Named(a, n) for a, n in zip(carry, names[:carries], strict=True)]
    more = zip(made, node.results[carries:], strict=True)
    return (*whole, *(Named(array, value.type.names) for array, value in more))


def _is_written_out(ctx: Context, body: Graph, slices: Slices, runs: int) -> bool:
    """Whether runs are compiled one by one, see `UNROLLED_BYTES`."""
    stacked_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(slices))
    is_worth_it = stacked_bytes >= UNROLLED_BYTES and runs * len(body) <= UNROLLED_NODES
    is_whole = ctx.view.mesh is None and ctx.interceptor is DIRECT
    return ctx.options.target == "cpu" and is_whole and is_worth_it


def _leading(x: Named, axis: str) -> Named:
    return x.to((axis, *(a for a in x.axes if a != axis)))


def _repeat(
    run: Step, carry: Arrays, slices: Slices, runs: int, unroll: bool = False
) -> tuple[Arrays, Arrays]:
    """Scan, with carries of a type that does not change: that which comes out."""
    for _ in range(_WIDENINGS):
        made, _ = jax.eval_shape(run, carry, jax.tree.map(lambda a: a[0], slices))
        if all(a.dtype == m.dtype for a, m in zip(carry, made, strict=True)):
            break
        carry = tuple(a.astype(m.dtype) for a, m in zip(carry, made, strict=True))
    found: tuple[Arrays, Arrays] = jax.lax.scan(run, carry, slices, runs, unroll=unroll)
    return found


def _remembering(node: Node) -> Remembering | None:
    """Return what makes a gradient keep what `node` names, and recompute the rest."""
    attrs = ScanAttrs.of_node(node)
    if attrs.remat == "none":
        return None
    policy = None
    if attrs.remat == "save":
        names = attrs.save or DEFAULT
        policy = jax.checkpoint_policies.save_only_these_names(*names)
    return partial(jax.checkpoint, policy=policy)


def _worth_keeping(primitive: jax.extend.core.Primitive, *_: object, **params: object) -> bool:
    """Whether a run of a loop that computes nothing dear again keeps what `primitive` makes.

    Values of the graph are kept by their names, and between them what is not cheap.  A cast with a
    gradient of its own, that of a parameter, is cheap: else every run would keep a copy of its own.
    """
    whole = params.get("call_jaxpr")
    if isinstance(whole, jax.extend.core.ClosedJaxpr):
        return not {e.primitive.name for e in whole.jaxpr.eqns} <= _CASTS
    return primitive.name not in _CHEAP


_KEEPING: Remembering = partial(jax.checkpoint, policy=_worth_keeping)
"""Keeps what the gradient needs, and gathers parameters again."""


def run_body(
    ctx: Context, body: Graph, operands: list[Named], in_loops: Remembering | None = None
) -> list[Named]:
    """Return the outputs of `body`, in order, lowered under the current trace.

    Args:
      ctx: the state outside.
      body: what is lowered.
      operands: its inputs, in order.
      in_loops: of several layers that are alike, which become a loop, makes each what keeps values
        for its gradient; None: there is no loop.
    """
    inner = ctx.within(dict(zip(body.inputs.values(), operands, strict=True)))
    if in_loops is None:
        lower_nodes(inner, body)
    else:
        for piece in pieces_of(body):
            if isinstance(piece, LayerLoop):
                _lower_loop(inner, piece, in_loops)
            else:
                lower_nodes(inner, piece.nodes)
    return [_whole(inner, inner.values[v], v) for v in body.terminator.operands]


def _lower_loop(ctx: Context, loop: LayerLoop, remembering: Remembering) -> None:
    """Lower layers that are alike as a loop; what is used later goes to the values of `ctx`."""
    captured = {each[0]: ctx.values[each[0]] for each in loop.captured}
    entries = [each[0] for each in (*loop.carries, *loop.stacked)]

    def run(carry: Arrays, now: Arrays) -> tuple[Arrays, Arrays]:
        if ctx.options.target == "tpu":
            now = tuple(map(_apart, now))
        given = zip(entries, (*carry, *now), strict=True)
        inner = ctx.within(captured | {v: Named(a, v.type.names) for v, a in given})
        lower_nodes(inner, loop.first.nodes)
        made = [_whole(inner, inner.values[v], v).array for v in loop.first.outputs]
        kept = tuple(made[number] for number in loop.carries.values())
        return kept, tuple(made[number] for number in loop.collected)

    first = tuple(_whole(ctx, ctx.values[each[0]], each[0]).array for each in loop.carries)
    slices = tuple(
        jnp.stack([_whole(ctx, ctx.values[v], v).array for v in each]) for each in loop.stacked
    )
    step = remembering(run, prevent_cse=False)
    carry, made = _repeat(step, first, slices, len(loop.layers))
    for number, array in zip(loop.carries.values(), carry, strict=True):
        last = loop.output(number)[-1]
        ctx.values[last] = Named(array, last.type.names)
    for number, stacked in zip(loop.collected, made, strict=True):
        for value, array in zip(loop.output(number), stacked, strict=True):
            ctx.values[value] = Named(array, value.type.names)


@jax.custom_vjp
def _apart(array: jax.Array) -> jax.Array:
    """Return a slice of a turn as an array of its own.

    libtpu compiles equal fusions once.  Without this, XLA gathers the slice with the dimension of
    turns, of size 1, and no product with it is equal to one outside of the loop.
    """
    return barrier(array)


_apart.defvjp(lambda array: (barrier(array), None), lambda _, gradient: (gradient,))


def _whole(ctx: Context, value: Operand, declared: Value) -> Named:
    assert isinstance(value, Named), "rows do not leave a body, nor a layer of it"
    settled = ctx.view.settled(value.array, declared.type)
    return replace(value, array=settled).to(declared.type.names)
