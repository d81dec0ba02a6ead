"""What a training step of a converted function costs beside a mixture that is written by hand.

    python benchmarks/any_jax_step.py [--pairs 15] [--dispatch NAME …] [--format json]

The model is a decoder in jax.numpy, its layers in a scan.  By hand, its blocks route tokens with
the same dispatch (``mixtures_by_hand.py``): every one that moecc has, `gathered` and `used`, which
are for decoding, on few tokens.  Both have the same parameters; steps run in turn, and the figure
is the median of the ratios of pairs, in seconds of processor time, which other work on the machine
disturbs less.

Then what the conversion of a model of 32 layers costs, each layer written out, arrays included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mixtures_by_hand import BY_HAND, CAPACITY, CAPACITY_FACTOR, OF_FEW_TOKENS, TOP_K, swiglu

from moecc import jax as mx

BOUND = 1.05
CONVERSION_BOUND_SECONDS = 1.0
DEEP = 32
LAYERS, VOCAB, EMBED, MLP, EXPERTS = 4, 256, 128, 384, 4
BATCH, SEQ, FEW = 4, 128, 4

Params = Any
Block = Callable[[Params, jax.Array, jax.Array], jax.Array]


def init() -> Params:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, shape[-2] ** -0.5, shape), jnp.float32)

    return {
        "table": draw(VOCAB, EMBED),
        "layers": {
            "attention": {n: draw(LAYERS, EMBED, EMBED) for n in "qkvo"},
            "mlp": {"gate": draw(LAYERS, EMBED, MLP), "up": draw(LAYERS, EMBED, MLP),
                    "down": draw(LAYERS, MLP, EMBED)},
        },
    }  # fmt: skip


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def dense(p: Params, router: jax.Array | None, x: jax.Array) -> jax.Array:
    return swiglu(p, x)


def loss(params: Params, tokens: jax.Array, block: Block = dense, routers: Any = None) -> Any:
    """Return the mean cross entropy of the next tokens."""
    seq = tokens.shape[1] - 1
    causal = jnp.tril(jnp.ones((seq, seq), bool))

    def layer(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
        p, router = each
        q, k, v = (norm(x) @ p["attention"][n] for n in "qkv")
        scores = jnp.where(causal, q @ k.mT * EMBED**-0.5, -1e9)
        x = x + jax.nn.softmax(scores) @ v @ p["attention"]["o"]
        return x + block(p["mlp"], router, norm(x)), None

    x, _ = jax.lax.scan(layer, params["table"][tokens[:, :-1]], (params["layers"], routers))
    found = jax.nn.log_softmax(norm(x) @ params["table"].T)
    return -jnp.mean(jnp.take_along_axis(found, tokens[:, 1:, None], -1))


def step(function: Callable[..., jax.Array]) -> Callable[[Params, jax.Array], Params]:
    def one(params: Params, tokens: jax.Array) -> tuple[Params, jax.Array]:
        value, gradients = jax.value_and_grad(function)(params, tokens)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients), value

    return jax.jit(one)


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def measured(dispatch: str, pairs: int) -> dict[str, float]:
    """Return the medians of seconds a step, and of the ratio of pairs."""
    shape = (1, FEW + 1) if dispatch in OF_FEW_TOKENS else (BATCH, SEQ + 1)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, shape), jnp.int32)
    slots = f" slots=capacity capacity-factor={CAPACITY_FACTOR}" if dispatch in CAPACITY else ""
    pipeline = f"upcycle{{experts={EXPERTS} top-k={TOP_K} router-std=1{slots}}}"
    moe = mx.convert(loss, init(), tokens, pipeline)
    (router_name,) = moe.params["moe"]

    def by_hand(params: Params, tokens: jax.Array) -> jax.Array:
        return loss(params["params"], tokens, BY_HAND[dispatch], params["moe"][router_name])

    runs = {"converted": step(moe(loss, dispatch=dispatch)), "by hand": step(by_hand)}
    found = {name: run(moe.params, tokens)[1] for name, run in runs.items()}
    apart = abs(float(found["converted"] - found["by hand"]))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(pairs):
        # Each is first in every other pair: what the other left in caches serves both alike.
        for name in sorted(runs, reverse=bool(turn % 2)):
            run = runs[name]
            times[name].append(seconds(lambda run=run: run(moe.params, tokens)))
    ratios = [a / b for a, b in zip(times["converted"], times["by hand"], strict=True)]
    return {
        "converted_seconds": statistics.median(times["converted"]),
        "by_hand_seconds": statistics.median(times["by hand"]),
        "ratio": statistics.median(ratios),
        "losses_apart": apart,
    }


def conversion_seconds(layers: int = DEEP, times: int = 5) -> float:
    """Return the median of seconds of processor time that a conversion takes."""
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)

    def layer() -> Params:
        block = {"gate": draw(EMBED, MLP), "up": draw(EMBED, MLP), "down": draw(MLP, EMBED)}
        return {"attention": {n: draw(EMBED, EMBED) for n in "qkvo"}, "mlp": block}

    def deep(params: Params, x: jax.Array) -> jax.Array:
        for p in params:
            q, k, v = (norm(x) @ p["attention"][n] for n in "qkv")
            x = x + jax.nn.softmax(q @ k.mT) @ v @ p["attention"]["o"]
            x = x + swiglu(p["mlp"], norm(x))
        return x

    params, x = [layer() for _ in range(layers)], draw(BATCH, SEQ, EMBED)
    pipeline = f"upcycle{{experts={EXPERTS} top-k={TOP_K}}},add-losses"
    found = []
    for _ in range(times + 1):
        start = time.process_time()
        mx.convert(deep, params, x, pipeline)
        found.append(time.process_time() - start)
    # What the first one loads and compiles is loaded once.
    return statistics.median(found[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dispatch", choices=BY_HAND, nargs="*", default=tuple(BY_HAND))
    parser.add_argument("--format", choices=("human", "json"), default="human")
    args = parser.parse_args()
    rows = {name: measured(name, args.pairs) for name in args.dispatch}
    conversion = conversion_seconds()
    if args.format == "json":
        found = {"bound": BOUND, "dispatch": rows, "conversion_seconds": conversion}
        print(json.dumps(found, indent=2))
    else:
        for name, row in rows.items():
            print(
                f"{name:12} converted {row['converted_seconds'] * 1e3:7.1f} ms"
                f"  by hand {row['by_hand_seconds'] * 1e3:7.1f} ms  ratio {row['ratio']:.3f}"
                f"  (at most {BOUND})"
            )
        print(
            f"a conversion of {DEEP} layers {conversion:.2f} s (at most {CONVERSION_BOUND_SECONDS})"
        )
    alike = all(row["losses_apart"] < 1e-5 for row in rows.values())
    quick = conversion <= CONVERSION_BOUND_SECONDS
    return 0 if alike and quick and all(row["ratio"] <= BOUND for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
