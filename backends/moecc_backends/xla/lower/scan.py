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

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array, lax

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.recurrence import DeltaRuleOp, reads_as_it_goes, result_names
from moecc.ir.ops.repetition import DEFAULT, IndexOp, ScanOp, StackOp, repetitions
from moecc.ir.ops.slots import is_slots
from moecc.ir.structure import statement
from moecc_backends.xla.lower.contract import is_precise_param
from moecc_backends.xla.trace.context import (
    DIRECT,
    TraceContext,
    lower_nodes,
    lowering,
    lowering_along,
)
from moecc_backends.xla.trace.host_arrays import Master, cast_all
from moecc_backends.xla.trace.values import Arrays, Function, Named, Operand, Uncast, accumulator

# Cutting a graph into segments that repeat, so that equal layers are compiled once.
#
# A segment is a run of nodes whose locations share a layer. Two segments of one structure (the same
# operations on operands that correspond) get one compiled function, and the parameters of a segment
# are needed only while it runs: a model of any depth costs the compilation of one layer of each
# kind, and the memory of one layer's parameters.

_LAYER = re.compile(r"(.*?layers\.(?:\d+|\{[^}]*\}))(?:\.|$)")


@dataclass
class GraphSegment:
    """A run of nodes with the values that flow in and out of it.

    Attributes:
      nodes: the nodes, in order.
      inputs: values from outside that it uses, parameters apart.
      params: the parameters that it uses.
      outputs: its values that are used later, or returned by the graph.
      last_uses: those of `inputs` that nothing uses afterwards.
      key: equal for segments that one compiled function serves.
    """

    nodes: list[Node]
    inputs: list[Value] = field(default_factory=list)
    params: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    last_uses: list[Value] = field(default_factory=list)
    key: tuple[object, ...] = ()


def segments(graph: Graph) -> list[GraphSegment]:
    """Return the segments of `graph`, in order: nodes of one layer, and no ragged value between."""
    cut: list[GraphSegment] = []
    layer: str | None = None
    ragged: set[Value] = set()
    at: dict[Node, int] = {}
    for node in graph:
        here = layer_of(node)
        if not cut or (here != layer and not ragged):
            cut.append(GraphSegment([]))
        layer = here
        cut[-1].nodes.append(node)
        at[node] = len(cut) - 1
        # The layout that a routing has goes with its value, so that counts as ragged too.
        ragged.update(v for v in node.results if v.type.ragged or is_slots(v))
        ragged = {v for v in ragged if not v.users.keys() <= at.keys()}
    at[graph.terminator] = len(cut)
    for i, segment in enumerate(cut):
        mine = set(segment.nodes)
        outside = dict.fromkeys(v for n in segment.nodes for v in n.operands if v.node not in mine)
        segment.params = [v for v in outside if v.is_param]
        segment.inputs = [v for v in outside if not v.is_param]
        results = [v for n in segment.nodes for v in n.results]
        segment.outputs = [v for v in results if not v.users.keys() <= mine]
        segment.last_uses = [v for v in segment.inputs if max(at[u] for u in v.users) == i]
        operands = (*segment.inputs, *segment.params)
        segment.key = computation_key(operands, segment.nodes, segment.outputs)
    return cut


def layer_of(node: Node) -> str | None:
    """Return the layer that `node` belongs to, ``layers.3`` or ``layers.{3..23..4}``, or None."""
    match = _LAYER.match(node.loc)
    return match.group(1) if match else None


def computation_key(
    operands: Sequence[Value], nodes: Sequence[Node], outputs: Sequence[Value]
) -> tuple[object, ...]:
    """Return a key that is equal for the same operations on corresponding operands.

    Shapes are those of the arrays at run time; what must agree here are the names of the axes, and
    whether a value comes in from outside the graph.
    """
    numbers = {value: number for number, value in enumerate(operands)}
    named = tuple((v.type.names, v.node is None) for v in operands)
    statements = tuple(statement(node, numbers) for node in nodes)
    return (named, statements, tuple(numbers[v] for v in outputs))


# Equal layers within a body, which become a loop of their own.
#
# One layer in four is sparse, so a body that repeats is a block of four layers, of which three are
# alike. Those that are alike and follow one another need to be lowered once.

Each = tuple[Value, ...]
"""A value of every layer, in order."""


@dataclass
class LayerLoop:
    """Layers that are alike, and the values that flow from one to the next.

    Attributes:
      layers: the layers, in order, two at least.
      carries: what the layer before made, by the number of the output; of the first, from outside.
      stacked: values from outside, another one for each layer.
      captured: values from outside that all of them use.
      collected: the outputs, by number, that something outside uses of other layers than the last.
    """

    layers: list[GraphSegment]
    carries: dict[Each, int] = field(default_factory=dict)
    stacked: list[Each] = field(default_factory=list)
    captured: list[Each] = field(default_factory=list)
    collected: list[int] = field(default_factory=list)

    @property
    def first(self) -> GraphSegment:
        """The layer that stands for all of them."""
        return self.layers[0]

    def output(self, number: int) -> Each:
        """Return an output of every layer."""
        return tuple(layer.outputs[number] for layer in self.layers)


def pieces_of(body: Graph) -> Iterator[GraphSegment | LayerLoop]:
    """Yield `body` piece by piece, in order; layers that are alike as one loop."""

    def kind(segment: GraphSegment) -> tuple[object, ...]:
        # Where operands come from, which stands first in a key, is looked at in `_loop`.
        return (layer_of(segment.nodes[0]) is not None, *segment.key[1:])

    for (is_layer, *_), group in groupby(segments(body), key=kind):
        layers = list(group)
        loop = _loop(layers) if is_layer and len(layers) > 1 else None
        if loop is None:
            yield from layers
        else:
            yield loop


def _is_alike(each: tuple[Value, ...]) -> bool:
    """Whether the values of all layers have one type, of a size that no routing decides."""
    first = each[0]
    return all(v.type == first.type for v in each) and not (first.type.extents or is_slots(first))


def _loop(layers: list[GraphSegment]) -> LayerLoop | None:
    """Return the loop over `layers`; None where they hang together in another way than a chain."""
    loop = LayerLoop(layers)
    produced = {v for layer in layers for v in layer.outputs}
    inputs = [tuple(each) for each in zip(*(layer.inputs for layer in layers), strict=True)]
    outputs = [loop.output(n) for n in range(len(loop.first.outputs))]
    if not all(map(_is_alike, (*inputs, *outputs))):
        return None
    for each in inputs:
        number = next((n for n, some in enumerate(outputs) if each[1:] == some[:-1]), None)
        if number is not None and each[0].type == outputs[number][0].type:
            loop.carries[each] = number
        elif produced.intersection(each):
            return None
        elif len(set(each)) == 1:
            loop.captured.append(each)
        else:
            loop.stacked.append(each)
    inside = {node for layer in layers for node in layer.nodes}
    for number, each in enumerate(outputs):
        used = [v for v in each if not v.users.keys() <= inside]
        if used and (used != [each[-1]] or number not in loop.carries.values()):
            loop.collected.append(number)
    return loop


Slices = tuple[Array | Master, ...]
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
    attrs = ScanOp.of_node(scan)
    return value in scan.operands[attrs.carries : attrs.carries + attrs.stacked]


def is_cast_by_layer(value: Value) -> bool:
    """Return whether loops alone read the parameter `value`, slice by slice, and may cast it."""
    loops = bool(value.users) and all(user.body is not None for user in value.users)
    return loops and not is_precise_param(value) and all(is_stacked(u, value) for u in value.users)


@lowering("stack")
def _stack(ctx: TraceContext, node: Node, *xs: Named) -> Operand:
    axes = xs[0].axes
    return Named(jnp.stack([x.to(axes).array for x in xs]), (StackOp.of_node(node).axis, *axes))


@lowering_along("index")
def _index(ctx: TraceContext, node: Node, x: Named) -> Named:
    attrs = IndexOp.of_node(node)
    picked = jnp.take(x.array, attrs.at, axis=x.axes.index(attrs.axis))
    return Named(picked, tuple(a for a in x.axes if a != attrs.axis))


@lowering("scan")
def _scan(ctx: TraceContext, node: Node, *operands: Named) -> tuple[Operand, ...]:
    attrs = ScanOp.of_node(node)
    body = node.body
    assert body is not None, "a scan has a body"
    carries, last = attrs.carries, attrs.carries + attrs.stacked
    axis, runs = repetitions(node.attrs)
    slices = [x.to((axis, *(a for a in x.axes if a != axis))) for x in operands[carries:last]]
    captured = [x.array for x in operands[last:]]
    names = [x.axes for x in operands]
    names[carries:last] = [x.axes[1:] for x in slices]

    # What a gradient keeps of what the run names; it computes the rest again.
    remembering = None
    if attrs.remat != "none":
        saved = jax.checkpoint_policies.save_only_these_names(*(attrs.save or DEFAULT))
        policy = saved if attrs.remat == "save" else None
        remembering = partial(jax.checkpoint, policy=policy)
    in_loops = _KEEPING if attrs.remat == "block" else remembering
    inner = list(zip(body.inputs.values(), node.operands, strict=True))
    weights = {i for i, v in inner if v.is_param or v in ctx.weights}
    outside = {i: ctx.outside.get(v, v) for i, v in inner[last:]}

    def run(carry: Arrays, now: Slices) -> tuple[Arrays, Arrays]:
        if ctx.view.mesh is not None:
            # On whole arrays XLA's partitioner would gather for the constraint.
            now = tuple(
                a.as_stored(ctx.options.target) if isinstance(a, Master) else a for a in now
            )
        pairs = zip((*carry, *cast_all(now), *captured), names, strict=True)
        within = replace(ctx, weights=set(weights), outside=outside)
        outputs = run_body(within, body, [Named(array, axes) for array, axes in pairs], in_loops)
        # A carry keeps the order of its axes from run to run.
        carried = zip(outputs[:carries], names[:carries], strict=True)
        return tuple(m.to(n).array for m, n in carried), tuple(m.array for m in outputs[carries:])

    initial = zip(operands[:carries], node.operands, strict=False)
    first = tuple(ctx.view.settled(x.array, v.type) for x, v in initial)
    # Within a loop nothing could be merged across the barrier that this would set.
    step = (remembering or _KEEPING)(run, prevent_cse=False)
    now = tuple(x.master if isinstance(x, Uncast) else x.array for x in slices)
    stacked_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(now))
    is_written_out = (
        (ctx.options.target == "cpu" and remembering is None)
        and (ctx.view.mesh is None and ctx.interceptor is DIRECT)
        and (stacked_bytes >= UNROLLED_BYTES and runs * len(body) <= UNROLLED_NODES)
    )
    carry, stacked = _repeat(step, first, now, runs, is_written_out)
    finals = [Named(a, n) for a, n in zip(carry, names[:carries], strict=True)]
    more = zip(stacked, node.results[carries:], strict=True)
    return (*finals, *(Named(array, value.type.names) for array, value in more))


def _repeat(
    run: Step, carry: Arrays, slices: Slices, runs: int, unroll: bool = False
) -> tuple[Arrays, Arrays]:
    """Scan, with carries of a type that does not change: that which comes out."""
    for _ in range(_WIDENINGS):
        carried, _ = jax.eval_shape(run, carry, jax.tree.map(lambda a: a[0], slices))
        if all(a.dtype == m.dtype for a, m in zip(carry, carried, strict=True)):
            break
        carry = tuple(a.astype(m.dtype) for a, m in zip(carry, carried, strict=True))
    return lax.scan(run, carry, slices, runs, unroll=unroll)


def _worth_keeping(primitive: jax.extend.core.Primitive, *_: object, **params: object) -> bool:
    """Whether a run of a loop that computes nothing dear again keeps what `primitive` makes.

    Values of the graph are kept by their names, and between them what is not cheap.  A cast with a
    gradient of its own, that of a parameter, is cheap: else every run would keep a copy of its own.
    """
    call = params.get("call_jaxpr")
    if isinstance(call, jax.extend.core.ClosedJaxpr):
        return not {e.primitive.name for e in call.jaxpr.eqns} <= _CASTS
    return primitive.name not in _CHEAP


_KEEPING: Remembering = partial(jax.checkpoint, policy=_worth_keeping)
"""Keeps what the gradient needs, and gathers parameters again."""


def run_body(
    ctx: TraceContext, body: Graph, operands: list[Named], in_loops: Remembering | None = None
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


def _lower_loop(ctx: TraceContext, loop: LayerLoop, remembering: Remembering) -> None:
    """Lower layers that are alike as a loop; values that are used later join those of `ctx`."""
    captured = {each[0]: ctx.values[each[0]] for each in loop.captured}
    entries = [each[0] for each in (*loop.carries, *loop.stacked)]

    def run(carry: Arrays, now: Arrays) -> tuple[Arrays, Arrays]:
        if ctx.options.target == "tpu":
            now = tuple(map(_apart, now))
        pairs = zip(entries, (*carry, *now), strict=True)
        inner = ctx.within(captured | {v: Named(a, v.type.names) for v, a in pairs})
        lower_nodes(inner, loop.first.nodes)
        outputs = [_whole(inner, inner.values[v], v).array for v in loop.first.outputs]
        carried = tuple(outputs[number] for number in loop.carries.values())
        return carried, tuple(outputs[number] for number in loop.collected)

    first = tuple(_whole(ctx, ctx.values[each[0]], each[0]).array for each in loop.carries)
    slices = tuple(
        jnp.stack([_whole(ctx, ctx.values[v], v).array for v in each]) for each in loop.stacked
    )
    step = remembering(run, prevent_cse=False)
    carry, collected = _repeat(step, first, slices, len(loop.layers))
    for number, array in zip(loop.carries.values(), carry, strict=True):
        last = loop.output(number)[-1]
        ctx.values[last] = Named(array, last.type.names)
    for number, stacked in zip(loop.collected, collected, strict=True):
        for value, array in zip(loop.output(number), stacked, strict=True):
            ctx.values[value] = Named(array, value.type.names)


@jax.custom_vjp
def _apart(array: Array) -> Array:
    """Return a slice of a turn as an array of its own.

    libtpu compiles equal fusions once.  Without this, XLA gathers the slice with the dimension of
    turns, of size 1, and no product with it is equal to one outside of the loop.
    """
    return lax.optimization_barrier(array)


_apart.defvjp(
    lambda array: (lax.optimization_barrier(array), None), lambda _, gradient: (gradient,)
)


def _whole(ctx: TraceContext, value: Operand, declared: Value) -> Named:
    assert isinstance(value, Named), "rows do not leave a body, nor a layer of it"
    settled = ctx.view.settled(value.array, declared.type)
    return replace(value, array=settled).to(declared.type.names)


@lowering("delta_rule", names_result=True)
def _delta_rule(ctx: TraceContext, node: Node, *operands: Named) -> Named:
    attrs, mask = DeltaRuleOp.of_node(node), node.operands[-1]
    queries = reads_as_it_goes(ctx.outside.get(mask, mask), attrs.along)
    query, key, value, decay, rate, seen = operands
    wide, along = accumulator(query.array.dtype), attrs.along
    names = result_names(query.axes, key.axes, value.axes, attrs)
    # One state serves all queries where each reads what the keys up to its own have written; else
    # every query has a state of its own.
    axes = tuple(a for a in names if a != queries)
    state_axes = (*axes, attrs.over)

    def in_order(x: Named, axis: str) -> Array:
        """Return ``[axis, …]``, laid out for the state at each place."""
        array = x.over((axis, *state_axes))
        return array if array.dtype == jnp.bool_ else array.astype(wide)

    def write(state: Array, k: Array, v: Array, factor: Array, share: Array) -> Array:
        decayed = factor * state
        error = v - jnp.sum(decayed * k, axis=-1, keepdims=True)
        return decayed + k * (share * error)

    def read(state: Array, q: Array) -> Array:
        return jnp.sum(state * q, axis=-1)

    written = tuple(in_order(x, along) for x in (key, value, decay, rate))
    sizes = value.sizes | query.sizes
    # Of the operands, so that it varies over a mesh as they do.
    start = jnp.zeros([sizes[a] for a in state_axes], wide) + 0 * sum(x[0] for x in written)
    if queries is not None:

        def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
            q, *parts = inputs
            state = write(state, *parts)
            return state, read(state, q)

        _, result = lax.scan(step, start, (in_order(query, queries), *written))
        mixed = Named(result.astype(query.array.dtype), (queries, *axes))
        return mixed.to(names)

    def masked(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        is_seen, *parts = inputs
        return jnp.where(is_seen, write(state, *parts), state), None

    start = start + 0 * query.over(state_axes).astype(wide)
    state, _ = lax.scan(masked, start, (in_order(seen, along), *written))
    result = read(state, query.over(state_axes).astype(wide))
    return Named(result.astype(query.array.dtype), axes)
