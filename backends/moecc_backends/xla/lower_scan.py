"""Lowering of repetition: a body that is compiled once, whatever the number of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.kept import DEFAULT
from moecc.ir.table.repetition import repetitions
from moecc_backends.xla.context import Context, lower_nodes, lowering
from moecc_backends.xla.named import Named, Operand, lifted

Arrays = tuple[jax.Array, ...]
Step = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]

_WIDENINGS = 3
"""How often the type of a carry may widen before it must stay: bf16, f32, f64."""


@lowering("stack")
def _stack(ctx: Context, node: Node, *xs: Named) -> Operand:
    axes = xs[0].axes
    return Named(jnp.stack([x.to(axes).array for x in xs]), (node.attrs["axis"], *axes))


@lowering("index")
def _index(ctx: Context, node: Node, x: Operand) -> Operand:
    axis, at = node.attrs["axis"], node.attrs["at"]

    def pick(full: Named) -> Named:
        rest = tuple(a for a in full.axes if a != axis)
        return Named(jnp.take(full.array, at, axis=full.axes.index(axis)), rest)

    return lifted(x, pick)


@lowering("scan")
def _scan(ctx: Context, node: Node, *operands: Named) -> tuple[Operand, ...]:
    body = node.body
    assert body is not None, "a scan has a body"
    carries, last = node.attrs["carries"], node.attrs["carries"] + node.attrs["stacked"]
    axis, runs = repetitions(node.attrs)
    slices = [_leading(x, axis) for x in operands[carries:last]]
    captured = [x.array for x in operands[last:]]
    names = [x.axes for x in operands]
    names[carries:last] = [x.axes[1:] for x in slices]

    def run(carry: Arrays, now: Arrays) -> tuple[Arrays, Arrays]:
        given = zip((*carry, *now, *captured), names, strict=True)
        made = run_body(ctx, body, [Named(array, axes) for array, axes in given])
        # A carry keeps the order of its axes from run to run.
        kept = tuple(m.to(n).array for m, n in zip(made[:carries], names[:carries], strict=True))
        return kept, tuple(m.array for m in made[carries:])

    entered = zip(operands[:carries], node.operands, strict=False)
    first = tuple(ctx.local.settled(x.array, v.type) for x, v in entered)
    carry, made = _repeat(_remembering(run, node), first, tuple(x.array for x in slices), runs)
    whole = [Named(a, n) for a, n in zip(carry, names[:carries], strict=True)]
    more = zip(made, node.results[carries:], strict=True)
    return (*whole, *(Named(array, value.type.names) for array, value in more))


def _leading(x: Named, axis: str) -> Named:
    return x.to((axis, *(a for a in x.axes if a != axis)))


def _repeat(run: Step, carry: Arrays, slices: Arrays, runs: int) -> tuple[Arrays, Arrays]:
    """Scan, with carries of a type that does not change: that which comes out."""
    for _ in range(_WIDENINGS):
        made, _ = jax.eval_shape(run, carry, tuple(a[0] for a in slices))
        if all(a.dtype == m.dtype for a, m in zip(carry, made, strict=True)):
            break
        carry = tuple(a.astype(m.dtype) for a, m in zip(carry, made, strict=True))
    found: tuple[Arrays, Arrays] = jax.lax.scan(run, carry, slices, runs)
    return found


def _remembering(run: Step, node: Node) -> Step:
    """Return `run` so that its gradient keeps what the node says, and computes the rest again."""
    remat = node.attrs["remat"]
    if remat == "none":
        return run
    policy = None
    if remat == "save":
        names = node.attrs["save"] or DEFAULT
        policy = jax.checkpoint_policies.save_only_these_names(*names)
    # Within a loop nothing could be merged across the barrier that this would set.
    remembering: Step = jax.checkpoint(run, prevent_cse=False, policy=policy)
    return remembering


def run_body(ctx: Context, body: Graph, operands: list[Named]) -> list[Named]:
    """Return the outputs of `body`, in order, lowered under the current trace."""
    values: dict[Value, Operand] = dict(zip(body.inputs.values(), operands, strict=True))
    local = replace(ctx.local, spread={})
    inner = replace(ctx, values=values, packings={}, siblings={}, put_off={}, local=local)
    lower_nodes(inner, body)
    return [_whole(inner, values[v], v) for v in body.terminator.operands]


def _whole(ctx: Context, value: Operand, declared: Value) -> Named:
    assert isinstance(value, Named), "rows do not leave a body"
    settled = replace(value, array=ctx.local.settled(value.array, declared.type))
    return settled.to(declared.type.names)
