"""Llama and T5 as one would write them with jax.numpy alone, over the weights of a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, THETA, EPSILON = 2048, 10000.0, 1e-5
BUCKETS, FURTHEST = 32, 128

Array = Any
Params = dict[str, Array]
Batch = dict[str, Array]


def llama_config(width: int, neurons: int, layers: int, heads: int) -> dict[str, object]:
    """Return the config of a decoder."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": width, "intermediate_size": neurons, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "hidden_act": "silu", "rms_norm_eps": EPSILON, "max_position_embeddings": 2048,
        "rope_theta": THETA, "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip


def t5_config(width: int, neurons: int, layers: int, heads: int) -> dict[str, object]:
    """Return the config of an encoder-decoder, with as many layers in each."""
    return {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": VOCAB,
        "d_model": width, "d_kv": width // heads, "d_ff": neurons, "num_layers": layers,
        "num_decoder_layers": layers, "num_heads": heads, "layer_norm_epsilon": EPSILON,
        "relative_attention_num_buckets": BUCKETS, "relative_attention_max_distance": FURTHEST,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0,
        "eos_token_id": 1, "dropout_rate": 0.0, "torch_dtype": "float32",
    }  # fmt: skip


def norm(x: Array, weight: Array) -> Array:
    """Divide by the root of the mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * weight


def mixed(q: Array, k: Array, v: Array, bias: Array, scale: float) -> Array:
    """Average values ``[batch, seq, head, width]``; `bias` hides keys by minus infinity."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def causal(seq: int) -> Array:
    """Hide later keys."""
    return jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), 0, -jnp.inf)


class Llama:
    """A decoder."""

    def __init__(self, width: int, neurons: int, layers: int, heads: int) -> None:
        self.config = llama_config(width, neurons, layers, heads)
        self.layers, self.heads, self.each = layers, heads, width // heads

    def __call__(self, p: Params, batch: Batch) -> Array:
        """Return logits ``[batch, seq, vocab]``."""
        tokens = batch["tokens"]
        frequencies = THETA ** (-jnp.arange(0, self.each, 2) / self.each)
        angles = jnp.arange(tokens.shape[1])[:, None] * frequencies
        both = jnp.concatenate([angles, angles], axis=-1)[:, None]
        turn, hidden = (jnp.cos(both), jnp.sin(both)), causal(tokens.shape[1])
        x = p["model.embed_tokens.weight"][tokens]
        for number in range(self.layers):
            name = f"model.layers.{number}"
            y = norm(x, p[f"{name}.input_layernorm.weight"])
            x = x + self._attention(p, name, y, turn, hidden)
            x = x + self._ffn(p, name, norm(x, p[f"{name}.post_attention_layernorm.weight"]))
        return norm(x, p["model.norm.weight"]) @ p["model.embed_tokens.weight"].T

    def _attention(self, p: Params, name: str, x: Array, turn: Any, hidden: Array) -> Array:
        q, k, v = (
            (x @ p[f"{name}.self_attn.{n}_proj.weight"].T).reshape(*x.shape[:2], self.heads, -1)
            for n in "qkv"
        )
        found = mixed(self._rotated(q, *turn), self._rotated(k, *turn), v, hidden, self.each**-0.5)
        return found.reshape(x.shape) @ p[f"{name}.self_attn.o_proj.weight"].T

    def _rotated(self, x: Array, cos: Array, sin: Array) -> Array:
        left, right = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-right, left], axis=-1) * sin

    def _ffn(self, p: Params, name: str, x: Array) -> Array:
        gate, up = (x @ p[f"{name}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return (jax.nn.silu(gate) * up) @ p[f"{name}.mlp.down_proj.weight"].T


class T5:
    """An encoder-decoder; its head has weights of its own."""

    def __init__(self, width: int, neurons: int, layers: int, heads: int) -> None:
        self.config = t5_config(width, neurons, layers, heads)
        self.layers, self.heads = layers, heads

    def __call__(self, p: Params, batch: Batch) -> Array:
        """Return logits ``[batch, seq, vocab]``."""
        tokens, texts = batch["tokens"], batch["decoder_tokens"]
        x = self._stack(p, "encoder", p["shared.weight"][tokens], None)
        y = self._stack(p, "decoder", p["shared.weight"][texts], x)
        return y @ p["lm_head.weight"].T

    def _stack(self, p: Params, name: str, x: Array, encoded: Array | None) -> Array:
        seq, first = x.shape[1], f"{name}.block.0.layer.0.SelfAttention"
        table = p[f"{first}.relative_attention_bias.weight"]
        bias = table[buckets(seq, bidirectional=encoded is None)].transpose(2, 0, 1)
        bias = bias if encoded is None else bias + causal(seq)
        for number in range(self.layers):
            block = f"{name}.block.{number}.layer"
            y = norm(x, p[f"{block}.0.layer_norm.weight"])
            x = x + self._attention(p, f"{block}.0.SelfAttention", y, y, bias)
            if encoded is not None:
                y = norm(x, p[f"{block}.1.layer_norm.weight"])
                x = x + self._attention(p, f"{block}.1.EncDecAttention", y, encoded, 0)
            last = f"{block}.{1 if encoded is None else 2}"
            x = x + self._ffn(p, last, norm(x, p[f"{last}.layer_norm.weight"]))
        return norm(x, p[f"{name}.final_layer_norm.weight"])

    def _attention(self, p: Params, name: str, x: Array, read: Array, bias: Any) -> Array:
        q, k, v = (
            (y @ p[f"{name}.{n}.weight"].T).reshape(*y.shape[:2], self.heads, -1)
            for n, y in (("q", x), ("k", read), ("v", read))
        )
        return mixed(q, k, v, bias, 1.0).reshape(x.shape) @ p[f"{name}.o.weight"].T

    def _ffn(self, p: Params, name: str, x: Array) -> Array:
        gate, up = (x @ p[f"{name}.DenseReluDense.wi_{n}.weight"].T for n in (0, 1))
        return (jax.nn.gelu(gate) * up) @ p[f"{name}.DenseReluDense.wo.weight"].T


def buckets(seq: int, *, bidirectional: bool) -> Array:
    """Return the bucket of each pair of a query and a key (Raffel et al. 2020, mesh-tensorflow)."""
    apart = np.arange(seq)[None] - np.arange(seq)[:, None]
    count = BUCKETS // 2 if bidirectional else BUCKETS
    found = (apart > 0) * count if bidirectional else np.zeros_like(apart)
    apart = np.abs(apart) if bidirectional else np.maximum(-apart, 0)
    near = count // 2
    far = np.log(np.maximum(apart, 1) / near) / np.log(FURTHEST / near) * (count - near) + 1e-9
    return found + np.where(apart < near, apart, np.minimum(near + far.astype(int), count - 1))
