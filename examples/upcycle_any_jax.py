"""SmolLM2-135M in forty lines of jax.numpy, upcycled as it stands, and trained for a few steps.

    python examples/upcycle_any_jax.py [--model SOURCE] [--steps 4]

The decoder below is no model that moecc knows: its feed-forward blocks are found in the traced
function.  The result is compared with what ``moecc convert`` makes of the same checkpoint, both in
float64: in float32 thirty layers round by more than the bound, each in its own order of sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from downloads import SMOLLM2, SMOLLM2_FILE
from moecc_backends.xla.backend import function
from script import console, exit_code, step

from moecc import jax as mx
from moecc.errors import CheckError
from moecc.formats.open import open_checkpoint
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.types import F32, F64, DType

PIPELINE = "upcycle{{experts=4 top-k=2 layers=every:{every}}},add-losses"
BOUND = 1e-6
"""How far logits in float64 may be apart, relative to the largest."""


def decoder(params: Any, tokens: jax.Array, config: Mapping[str, Any]) -> jax.Array:
    """Return the logits of a Llama, ``[batch, seq, vocab]``."""
    p, eps = params["model"], config["rms_norm_eps"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    x = p["embed_tokens"]["weight"][tokens]
    size = config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    turned = rotations(tokens.shape[1], size, theta, x.dtype)
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    for number in range(config["num_hidden_layers"]):
        layer = p["layers"][str(number)]
        h, w = norm(x, layer["input_layernorm"]["weight"], eps), layer["self_attn"]
        q, k, v = (
            (h @ w[f"{name}_proj"]["weight"].T).reshape(*tokens.shape, -1, size) for name in "qkv"
        )
        q, k = rotate(q, turned), rotate(k, turned)
        k, v = (jnp.repeat(a, heads // kv, axis=2) for a in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * size**-0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + mixed @ w["o_proj"]["weight"].T
        h, w = norm(x, layer["post_attention_layernorm"]["weight"], eps), layer["mlp"]
        gate, up = (h @ w[f"{name}_proj"]["weight"].T for name in ("gate", "up"))
        x = x + (jax.nn.silu(gate) * up) @ w["down_proj"]["weight"].T
    head = params["lm_head"] if "lm_head" in params else p["embed_tokens"]
    logits: jax.Array = norm(x, p["norm"]["weight"], eps) @ head["weight"].T
    return logits


def norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Normalise by the root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * gain


def rotations(count: int, size: int, theta: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of rotary positions, ``[seq, 1, size]``."""
    # By NumPy, in float64: angles in float32 are off by more than the model at a sequence's end.
    angles = np.arange(count)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    both = np.concatenate([angles, angles], -1)[:, None, :]
    return jnp.asarray(np.cos(both), dtype), jnp.asarray(np.sin(both), dtype)


def rotate(x: jax.Array, turned: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate pairs of ``[batch, seq, head, size]``, the halves of a head being the pairs."""
    first, second = jnp.split(x, 2, -1)
    return x * turned[0] + jnp.concatenate([-second, first], -1) * turned[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="another Llama; SmolLM2-135M by default")
    parser.add_argument("--every", type=int, default=10, help="which layers become sparse")
    parser.add_argument("--steps", type=int, default=4, help="how many steps to train")
    given = parser.parse_args(argv)
    return exit_code(lambda: run(given.model, given.every, given.steps))


def run(source: str | None, every: int, steps: int) -> None:
    """Load, convert, compare, train.

    Raises:
      CheckError: the converted function is not that of ``moecc convert``.
    """
    path = source or str(SMOLLM2.fetch(console.print) / SMOLLM2_FILE)
    pipeline = PIPELINE.format(every=every)
    with step("The weights, as a tree"):
        params, config = load(path)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, config["vocab_size"], (2, 33)))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return decoder(params, tokens, config)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        found = logits(params, tokens[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:])
        return jnp.mean(each)

    with step("Convert the function"):
        moe = mx.convert(
            logits, params, tokens, pipeline, tokens={"tokens": ("batch", "seq")}, causal=True
        )
        console.print(str(moe.report), markup=False)
    with step("Compare with moecc convert"):
        narrow, wide = (
            (run_in(dtype, moe, logits, tokens), by_family(path, pipeline, tokens, dtype))
            for dtype in (F32, F64)
        )
        apart = compare(*wide)
        rounding = [compare(one, other) for one, other in zip(narrow, wide, strict=True)]
        console.print(f"  in float64, logits differ by {apart:.1e} of the largest")
        console.print(
            f"  in float32, by {compare(*narrow):.1e}; rounding alone moves the decoder's by"
        )
        console.print(f"  {rounding[0]:.1e}, and those of moecc convert by {rounding[1]:.1e}")
        if apart > BOUND:
            raise CheckError("not the function that moecc convert makes", found=f"{apart:.1e}")
    with step(f"Train {steps} steps"):
        for number, value in enumerate(train(moe, loss, tokens, steps)):
            console.print(f"  step {number}: loss {value:.4f}")


def load(path: str) -> tuple[Any, Mapping[str, Any]]:
    """Return the tensors of a checkpoint as a tree of float32, and its config."""
    tree: dict[str, Any] = {}
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            *folders, last = name.split(".")
            inner = tree
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[last] = jnp.asarray(checkpoint.read(name), jnp.float32)
        return tree, dict(checkpoint.config)


def run_in(dtype: DType, moe: Any, logits: Any, tokens: jax.Array) -> np.ndarray:
    """Return the logits of the converted decoder, computed in a type."""
    with jax.enable_x64(dtype is F64):
        params = jax.tree.map(lambda a: a.astype(dtype.numpy), moe.params)
        return np.asarray(jax.jit(moe(logits))(params, tokens))


def by_family(path: str, pipeline: str, tokens: jax.Array, dtype: DType) -> np.ndarray:
    """Return the logits of the model as ``moecc convert`` converts it, by its family."""
    with open_model(path) as model, jax.enable_x64(dtype is F64):
        run_pipeline(model.graph, Pipeline.parse(pipeline))
        run = jax.jit(function(model.graph, dtype=dtype))
        return np.asarray(run(dict(model.params()), {"tokens": tokens})["logits"])


def compare(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest of `expected`."""
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def train(moe: Any, loss: Any, tokens: jax.Array, steps: int) -> list[float]:
    """Return the losses of a few steps on one batch."""
    optimizer = optax.adam(1e-4)
    value = jax.value_and_grad(moe(loss, losses=True), has_aux=True)

    @jax.jit
    def one(params: Any, state: Any) -> Any:
        (total, _), gradients = value(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, total

    params, state, losses = moe.params, optimizer.init(moe.params), []
    for _ in range(steps):
        params, state, total = one(params, state)
        losses.append(float(total))
    if losses and not losses[-1] < losses[0]:
        raise CheckError("training did not lower the loss", found=str(losses))
    return losses


if __name__ == "__main__":
    raise SystemExit(main())
