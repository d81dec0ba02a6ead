"""The programs that `moe_layer.py` compares."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from moecc_backends.xla.backend import function
from moecc_backends.xla.trace.context import Options

from moecc.ir import parse
from moecc.types import BF16, F32

Weights = dict[str, jax.Array]


class Case(NamedTuple):
    """Sizes of a layer."""

    tokens: int
    embed: int
    mlp: int
    experts: int
    top_k: int

    @property
    def rows(self) -> int:
        """Rows that the experts work on, one a choice."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Useful floating-point operations of the forward pass: three products a row."""
        return 6 * self.rows * self.embed * self.mlp


LOWERINGS = {
    "dropless": ("auto", False),
    "capacity": ("auto", True),
    "grouped": ("grouped", False),
    "grouped, slots": ("grouped", True),
    "ragged_dot": ("ragged_dot", False),
    "gathered": ("gathered", False),
}
"""The dispatch lowering of each program, and whether it has a capacity."""


class Program(NamedTuple):
    """A compiled function with its arguments, and the bytes it takes beside them."""

    call: Callable[[], Any]
    temporary_bytes: int
    output_bytes: int

    def seconds(self) -> tuple[float, float]:
        """Run it; return seconds by the clock and of processors."""
        wall, cpu = perf_counter(), process_time()
        jax.block_until_ready(self.call())
        return perf_counter() - wall, process_time() - cpu


def graph_text(case: Case, slots: str, place: str) -> str:
    """Return the text of the layer; `place` holds further attributes of the placement."""
    tokens, d, f, experts, k = case
    rows = f"group=1, expert={experts}, slot={slots}(%slots)"
    return f"""moecc 1
graph layer {{
  input %x : f32[token={tokens}, embed={d}]
  param %router : f32[expert={experts}, embed={d}]
  param %gate : f32[expert={experts}, mlp={f}, embed={d}]
  param %up : f32[expert={experts}, mlp={f}, embed={d}]
  param %down : f32[expert={experts}, embed={d}, mlp={f}]
  %logits = contract %x, %router {{over=embed}} : f32[token={tokens}, expert={experts}]
  %experts, %gates = route %logits {{top_k={k}}} : i32[token={tokens}, choice={k}], f32[token={tokens}, choice={k}]
  %slots = assign_slots %experts {{tokens=token, experts={experts}{place}}} : i32[token={tokens}, choice={k}]
  %rows = dispatch %x, %experts, %slots : f32[{rows}, embed={d}]
  %a = contract %rows, %gate {{over=embed}} : f32[{rows}, mlp={f}]
  %s = silu %a : f32[{rows}, mlp={f}]
  %u = contract %rows, %up {{over=embed}} : f32[{rows}, mlp={f}]
  %m = mul %s, %u : f32[{rows}, mlp={f}]
  %o = contract %m, %down {{over=mlp}} : f32[{rows}, embed={d}]
  %y = combine %o, %experts, %slots, %gates : f32[token={tokens}, embed={d}]
  output y = %y
}}
"""  # noqa: E501


def lowered(
    case: Case, dtype: str, dispatch: str = "auto", factor: float | None = None
) -> Callable[..., jax.Array]:
    """Return the layer as the xla backend makes it: dropless, or with a capacity factor."""
    bound = f", slots=capacity, convention=assignments, capacity_factor={factor}"
    text = graph_text(case, "capacity", bound) if factor else graph_text(case, "ragged", "")
    run = function(
        parse(text), dtype=BF16 if dtype == "bfloat16" else F32, options=Options(dispatch)
    )
    return lambda x, w: run(w, {"x": x})["y"]


def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply ``[experts, rows, in]`` with ``[experts, out, in]``; sums run in float32."""
    sums = jnp.einsum("eri,eoi->ero", rows, weight, preferred_element_type=jnp.float32)
    return sums.astype(rows.dtype)


def balanced(rows: jax.Array, w: Weights) -> jax.Array:
    """Run the experts on equal shares of ``[experts, rows, embed]``."""
    gate = product(rows, w["gate"])
    up = product(rows, w["up"])
    return product(jax.nn.silu(gate) * up, w["down"])


def products(rows: jax.Array, w: Weights) -> tuple[jax.Array, jax.Array]:
    """Make the three products of `balanced`, without its activation."""
    gate = product(rows, w["gate"])
    up = product(rows, w["up"])
    return gate, product(up, w["down"])


def draw(case: Case, dtype: str) -> tuple[jax.Array, Weights]:
    """Draw tokens and weights; a random router spreads tokens unevenly, as at initialisation."""
    rng = np.random.default_rng(0)
    e, d, f = case.experts, case.embed, case.mlp

    def normal(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[-1])
        return jnp.asarray(values).astype(dtype)

    weights = {"gate": normal(e, f, d), "up": normal(e, f, d), "down": normal(e, d, f)}
    return normal(case.tokens, d) * math.sqrt(d), weights | {"router": normal(e, d)}


def loads(case: Case, x: jax.Array, w: Weights) -> list[int]:
    """Return how many choices each expert gets."""
    _, experts = jax.lax.top_k(x @ w["router"].T, case.top_k)
    return np.bincount(np.asarray(experts).reshape(-1), minlength=case.experts).tolist()


def least_capacity_factor(case: Case, load: list[int]) -> float:
    """Return the least factor, to three decimals, that drops nothing."""
    return math.ceil(max(load) * case.experts / case.rows * 1000) / 1000


def build(layer: Callable[..., Any], x: jax.Array, w: Weights, gradients: bool) -> Program:
    """Compile `layer`, or `layer` and the gradients of half the square of its result."""

    def both(x: jax.Array, w: Weights) -> Any:
        result, pull = jax.vjp(layer, x, w)
        return result, pull(result)

    compiled = jax.jit(both if gradients else layer).lower(x, w).compile()
    memory = compiled.memory_analysis()
    return Program(lambda: compiled(x, w), memory.temp_size_in_bytes, memory.output_size_in_bytes)


def programs(
    case: Case, dtype: str, factor: float, mode: str, names: Sequence[str]
) -> dict[str, Program]:
    """Compile everything that is compared, the yardstick first, and the lowerings `names`."""
    x, w = draw(case, dtype)
    experts = {n: w[n] for n in ("gate", "up", "down")}
    rows = jnp.tile(x, (case.top_k, 1)).reshape(case.experts, -1, case.embed)
    gradients = mode != "forward"
    built = {
        "balanced": build(balanced, rows, experts, gradients),
        "products": build(products, rows, experts, gradients),
    }
    for name in names:
        dispatch, bound = LOWERINGS[name]
        layer = lowered(case, dtype, dispatch, factor if bound else None)
        built[name] = build(layer, x, w, gradients)
    return built


def check(built: dict[str, Program], dtype: str, most_bytes: int) -> None:
    """Stop if the layers, which compute the same, do not give the same."""
    layers = [name for name in built if name in LOWERINGS]
    expected = jax.tree.leaves(built[layers[0]].call())[0]
    for name in layers[1:]:
        if built[name].temporary_bytes > most_bytes:
            continue
        found = jax.tree.leaves(built[name].call())[0]
        error = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
        if not error < (1e-4 if dtype == "float32" else 0.02):
            sys.exit(f"{layers[0]} and {name} differ by {error:.1e}")
