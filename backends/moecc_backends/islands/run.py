"""Run a function with its blocks replaced: every other equation as it stands.

Loops, branches and checkpoints that hold blocks are built again around what is replaced; the rest
of them, and every other equation, is evaluated from the jaxpr of the user's function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from moecc.ir.graph import Value
from moecc.types import DTYPES, DType
from moecc_backends.islands.execution import Execution
from moecc_backends.islands.jaxprs import AnyArray, evaluate, is_literal, scan_sizes
from moecc_backends.islands.parts import Part
from moecc_backends.islands.scopes import UNKNOWN, Frame, Scope, Step, Val
from moecc_backends.islands.sites import Site

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
