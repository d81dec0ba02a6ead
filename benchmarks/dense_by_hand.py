"""Dense decoders beside the same in plain jnp: processor time of forward and gradient, in pairs.

    python benchmarks/dense_by_hand.py [SIZE…] [--pairs 15] [--batch 8] [--seq 256] [--format json]

SIZE is ``1M``, ``5M`` or ``15M``: Llama over 2,048 tokens.  Three programs compute one function
from the same weights: written by hand, as moecc's operations lower, and with attention as one
operation, as moecc's training steps have it.  The forward pass returns logits; the gradient is that
of the mean cross entropy, in all weights.  Both are float32, on one thread unless ``--threads`` is
more.  Each is first in its turn; a figure is the median of the ratios to the program by hand of the
same round, with the first and third quartile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

VOCAB = 2048
SIZES = {"1M": (128, 384, 3, 4), "5M": (256, 768, 5, 4), "15M": (384, 1152, 8, 6)}
"""Width, neurons, layers and heads."""

THETA, EPSILON = 10000.0, 1e-5

Array = Any
Params = dict[str, Array]
Program = Callable[[Params, Array], Array]


def config(size: str) -> dict[str, object]:
    """Return the config of a model."""
    width, neurons, layers, heads = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": width, "intermediate_size": neurons, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "hidden_act": "silu", "rms_norm_eps": EPSILON, "max_position_embeddings": 2048,
        "rope_theta": THETA, "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip


def by_hand(size: str) -> Program:
    """Return a decoder as one would write it with jax.numpy alone."""
    import jax
    import jax.numpy as jnp

    width, _, layers, heads = SIZES[size]
    each = width // heads

    def norm(x: Array, weight: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * weight

    def rotated(x: Array, cos: Array, sin: Array) -> Array:
        left, right = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-right, left], axis=-1) * sin

    def attention(p: Params, name: str, x: Array, cos: Array, sin: Array) -> Array:
        batch, seq, _ = x.shape
        q, k, v = (
            (x @ p[f"{name}.self_attn.{n}_proj.weight"].T).reshape(batch, seq, heads, each)
            for n in "qkv"
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * each**-0.5
        seen = jnp.tril(jnp.ones((seq, seq), bool))
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(batch, seq, width)
        return mixed @ p[f"{name}.self_attn.o_proj.weight"].T

    def ffn(p: Params, name: str, x: Array) -> Array:
        gate, up = (x @ p[f"{name}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return (jax.nn.silu(gate) * up) @ p[f"{name}.mlp.down_proj.weight"].T

    def run(p: Params, tokens: Array) -> Array:
        frequencies = THETA ** (-jnp.arange(0, each, 2) / each)
        angles = jnp.arange(tokens.shape[1])[:, None] * frequencies
        both = jnp.concatenate([angles, angles], axis=-1)[:, None]
        cos, sin = jnp.cos(both), jnp.sin(both)
        x = p["model.embed_tokens.weight"][tokens]
        for number in range(layers):
            name = f"model.layers.{number}"
            x = x + attention(p, name, norm(x, p[f"{name}.input_layernorm.weight"]), cos, sin)
            x = x + ffn(p, name, norm(x, p[f"{name}.post_attention_layernorm.weight"]))
        return norm(x, p["model.norm.weight"]) @ p["model.embed_tokens.weight"].T

    return run


def lowered(size: str, passes: str) -> Program:
    """Return what moecc makes of the model."""
    from moecc_backends.xla.backend import function

    from moecc.families import build
    from moecc.families.configs import parse_config
    from moecc.steps.passes import run_passes

    graph = build(parse_config(config(size)))
    run_passes(graph, passes)
    run = function(graph)
    return lambda p, tokens: run(p, {"tokens": tokens})["logits"]


def gradient(run: Program) -> Callable[[Params, Array], tuple[Array, Params]]:
    """Return the loss of the next tokens, and its gradient."""
    import jax
    import jax.numpy as jnp

    def loss(p: Params, tokens: Array) -> Array:
        logs = jax.nn.log_softmax(run(p, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1))

    return jax.value_and_grad(loss)


def drawn(size: str) -> Params:
    """Return weights of the model."""
    import jax.numpy as jnp

    from moecc.families import build
    from moecc.families.configs import parse_config
    from moecc.model.initialise import initialise
    from moecc.model.open import Model

    graph = build(parse_config(config(size)))
    initialise(graph)
    return {n: jnp.asarray(a) for n, a in Model(graph, "drawn").params().items()}


def compare(size: str, kind: str, args: argparse.Namespace) -> dict[str, object]:
    """Return the times of the programs of one kind, and their ratios to that by hand.

    Raises:
      AssertionError: they do not compute the same.
    """
    import jax
    import numpy as np

    params = drawn(size)
    long = args.seq + (kind == "gradient")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (args.batch, long)).astype(np.int32)
    made = {"by hand": by_hand(size), "parts": lowered(size, "canonicalize"),
            "moecc": lowered(size, "fuse-attention")}  # fmt: skip
    calls = {n: jax.jit(p if kind == "forward" else gradient(p)) for n, p in made.items()}
    results = {n: jax.tree.leaves(call(params, tokens)) for n, call in calls.items()}
    for found in results.values():
        for a, b in zip(found, results["by hand"], strict=True):
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max() + 1e-7, "another function"
    seconds: dict[str, list[float]] = {n: [] for n in calls}
    names = list(calls)
    for turn in range(args.pairs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.process_time()
            jax.block_until_ready(calls[name](params, tokens))
            seconds[name].append(time.process_time() - begin)
    count = sum(a.size for a in params.values())
    row: dict[str, object] = {"size": size, "kind": kind, "parameters": count}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["by hand"], strict=True)]
        row[name] = {"ms": 1e3 * statistics.median(times),
                     "ratio": statistics.quantiles(ratios, n=4)}  # fmt: skip
    return row


def main() -> None:
    """Print a row for each size and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    args = parser.parse_args()
    unknown = [name for name in args.sizes if name not in SIZES]
    if unknown:
        parser.error(f"unknown size {unknown[0]!r}; sizes: {', '.join(SIZES)}")
    # XLA has as many threads as the process has cores when it begins.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    for size in args.sizes or SIZES:
        for kind in ("forward", "gradient"):
            row = compare(size, kind, args)
            print(json.dumps(row) if args.format == "json" else text(row), flush=True)


def text(row: dict[str, Any]) -> str:
    """Return a row for people."""
    cells = [f"{row['size']:>4} {row['kind']:8} by hand {row['by hand']['ms']:7.1f} ms"]
    for name in ("parts", "moecc"):
        low, middle, high = row[name]["ratio"]
        cells.append(f"{name} {middle:.3f} ({low:.3f} to {high:.3f})")
    return "   ".join(cells)


if __name__ == "__main__":
    main()
