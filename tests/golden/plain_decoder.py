"""A forward pass of every decoder in plain NumPy, that knows nothing but typed configs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moecc.families.decoder import DecoderConfig
from moecc.families.gpt_oss import GptOssConfig
from moecc.families.mixture import MoeConfig
from moecc.families.rope import RopeConfig, attention_factor, rotary_frequencies

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]


def forward(config: DecoderConfig, tensors: Tensors, tokens: Array) -> Array:
    """Return logits [batch, seq, vocab] in float64."""
    weights = {key: tensor.astype(np.float64) for key, tensor in tensors.items()}
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding[tokens] * config.embedding_multiplier
    if config.scale_embedding:
        hidden = hidden * math.sqrt(config.hidden_size)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        part = {key.removeprefix(at): w for key, w in weights.items() if key.startswith(at)}
        part = unfused(config, part)
        before, after, first, last = PLACES[config.norm_placement]
        made = attention(config, part, norm(config, part, before, hidden), layer)
        hidden = hidden + config.residual_multiplier * norm(config, part, after, made)
        sparse = isinstance(config, MoeConfig) and config.sparse_layers[layer]
        block = moe if sparse else dense
        made = block(config, part, norm(config, part, first, hidden))  # type: ignore[operator]
        hidden = hidden + config.residual_multiplier * norm(config, part, last, made)
    hidden = normed(config, weights, "model.norm", hidden)
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    logits = hidden @ head.T + (weights["lm_head.bias"] if config.head_bias else 0)
    return capped(logits / config.logits_divisor, config.logit_softcap)


PLACES = {
    "before": ("input", "", "post_attention", ""),
    "after": ("", "post_attention", "", "post_feedforward"),
    "around": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}


def norm(config: DecoderConfig, part: Tensors, name: str, x: Array) -> Array:
    return normed(config, part, f"{name}_layernorm", x) if name else x


def normed(config: DecoderConfig, part: Tensors, name: str, x: Array) -> Array:
    if not config.layer_norm:
        return rms_norm(x, part[f"{name}.weight"], config)
    centred = x - x.mean(axis=-1, keepdims=True)
    return rms_norm(centred, part[f"{name}.weight"], config) + part[f"{name}.bias"]


def unfused(config: DecoderConfig, part: Tensors) -> Tensors:
    if "self_attn.qkv_proj.weight" not in part:
        return part
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    cuts = [heads, heads + groups]
    made = dict(part)
    for name, cut in zip("qkv", np.split(part["self_attn.qkv_proj.weight"], cuts), strict=True):
        made[f"self_attn.{name}_proj.weight"] = cut
    gate, up = np.split(part["mlp.gate_up_proj.weight"], 2)
    return {**made, "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}


def capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def attention(config: DecoderConfig, part: Tensors, x: Array, layer: int) -> Array:
    batch, seq, _ = x.shape
    query, key, value = (linear(part, f"self_attn.{name}_proj", x) for name in "qkv")
    if config.qk_norm_across:
        query = rms_norm(query, part["self_attn.q_norm.weight"], config)
        key = rms_norm(key, part["self_attn.k_norm.weight"], config)
    query, key, value = (y.reshape(batch, seq, -1, config.head_dim) for y in (query, key, value))
    if config.qk_norm and part["self_attn.q_norm.weight"].shape == query.shape[-1:]:
        query = rms_norm(query, part["self_attn.q_norm.weight"], config)
        key = rms_norm(key, part["self_attn.k_norm.weight"], config)
    if config.model_type == "ernie4_5_moe":
        # Neighbours are rotated together: put the first of each pair into the first half.
        query, key = (np.concatenate([y[..., 0::2], y[..., 1::2]], -1) for y in (query, key))
    window = config.sliding_windows[layer]
    rope = config.local_rope if window and config.local_rope else config.rope
    if config.rope_layers is None or config.rope_layers[layer]:
        query, key = rotate(config, rope, query), rotate(config, rope, key)
    repeats = config.num_attention_heads // config.num_key_value_heads
    key, value = np.repeat(key, repeats, axis=2), np.repeat(value, repeats, axis=2)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    scores = capped(scores, config.attention_softcap)
    distance = np.arange(seq)[:, None] - np.arange(seq)[None, :]
    seen = (distance >= 0) & (distance < (window or seq))
    scores = np.where(seen, scores, -np.inf)
    if isinstance(config, GptOssConfig):
        sinks = np.broadcast_to(
            part["self_attn.sinks"][None, :, None, None], (*scores.shape[:3], 1)
        )
        weights = softmax(np.concatenate([scores, sinks], axis=-1))[..., :-1]
    else:
        weights = softmax(scores)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, seq, -1)
    return linear(part, "self_attn.o_proj", mixed)


def rotate(config: DecoderConfig, rope: RopeConfig, x: Array) -> Array:
    seq, length = x.shape[1], config.max_position_embeddings
    width = config.rotary_dim or config.head_dim
    frequencies = rotary_frequencies(rope, width, max_position_embeddings=length, length=seq)
    angles = np.arange(seq)[:, None] * np.array(frequencies)
    cos = np.cos(angles)[None, :, None] * attention_factor(rope)
    sin = np.sin(angles)[None, :, None] * attention_factor(rope)
    first, second, rest = np.split(x, [width // 2, width], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def dense(config: DecoderConfig, part: Tensors, x: Array) -> Array:
    return swiglu(config, part, "mlp.", ("gate_proj", "up_proj", "down_proj"), x)


def moe(config: MoeConfig, part: Tensors, x: Array) -> Array:
    at, router, names, shared = MOE_NAMES.get(config.model_type, DEFAULT_MOE)
    if isinstance(config, GptOssConfig):
        part = apart_and_turned(config, part)
    elif "block_sparse_moe.input_linear.weight" in part:
        part = apart(config, part)
    logits = linear(part, f"{at}{router}", x)
    sigmoid = config.score == "sigmoid"
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
    bias = next((v for k, v in part.items() if k.endswith("e_score_correction_bias")), 0)
    order = np.argsort(-(scores + bias), axis=-1, kind="stable")
    chosen = np.argsort(order, axis=-1) < config.experts_per_token
    gates = sparse_mixer(logits) if config.model_type == "phimoe" else np.where(chosen, scores, 0)
    if config.norm_topk_prob:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    total = np.zeros_like(x)
    for expert in range(config.num_experts):
        out = swiglu(config, part, f"{at}experts.{expert}.", names, x)
        total += config.gate_scale * gates[..., expert, None] * out
    if config.shared_expert_intermediate_size is None:
        return total
    out = swiglu(config, part, f"{at}{shared}.", names, x)
    if not config.shared_gate:
        return total + out
    return total + out / (1 + np.exp(-linear(part, f"{at}shared_expert_gate", x)))


def sparse_mixer(logits: Array) -> Array:
    """Return the gates of Phi-3.5-MoE: each choice's softmax among the logits within 2 %."""
    gates, left = np.zeros_like(logits), logits
    for _ in range(2):
        best = left.max(axis=-1, keepdims=True)
        far = (best - logits) / np.maximum(np.abs(logits), best) > 0.02
        near = softmax(np.where(far, -np.inf, left))
        chosen = np.arange(logits.shape[-1]) == left.argmax(axis=-1)[..., None]
        gates = gates + np.where(chosen, near, 0)
        left = np.where(chosen, -np.inf, left)
    return gates


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DEFAULT_MOE = ("mlp.", "gate", PROJECTIONS, "shared_expert")
MOE_NAMES = {
    "mixtral": ("block_sparse_moe.", "gate", ("w1", "w3", "w2"), ""),
    "phimoe": ("block_sparse_moe.", "gate", ("w1", "w3", "w2"), ""),
    "gpt_oss": ("mlp.", "router", PROJECTIONS, ""),
    "granitemoe": ("block_sparse_moe.", "router.layer", PROJECTIONS, ""),
    "glm4_moe": ("mlp.", "gate", PROJECTIONS, "shared_experts"),
    "ernie4_5_moe": ("mlp.", "gate", PROJECTIONS, "shared_experts"),
}
"""By family: the prefix, the router, the matrices, the shared expert."""


def apart(config: MoeConfig, part: Tensors) -> Tensors:
    """Return the experts of a layer one by one."""
    made, at = dict(part), "block_sparse_moe."
    for expert in range(config.num_experts):
        gate, up = np.split(part[f"{at}input_linear.weight"][expert], 2)
        matrices = (gate, up, part[f"{at}output_linear.weight"][expert])
        for name, matrix in zip(PROJECTIONS, matrices, strict=True):
            made[f"{at}experts.{expert}.{name}.weight"] = matrix
    return made


def apart_and_turned(config: MoeConfig, part: Tensors) -> Tensors:
    """Return the experts of a gpt_oss one by one: gate and up alternate, inputs come first."""
    made, at = dict(part), "mlp.experts."
    for expert in range(config.num_experts):
        for end, stored in (("weight", "proj"), ("bias", "proj_bias")):
            both, down = (part[f"{at}{name}_{stored}"][expert].T for name in ("gate_up", "down"))
            for name, matrix in zip(PROJECTIONS, (both[0::2], both[1::2], down), strict=True):
                made[f"{at}{expert}.{name}.{end}"] = matrix
    return made


def swiglu(
    config: DecoderConfig, part: Tensors, at: str, names: tuple[str, ...], x: Array
) -> Array:
    gate, up, down = (f"{at}{name}" for name in names)
    opened, raised = linear(part, gate, x), linear(part, up, x)
    if isinstance(config, GptOssConfig):
        limit = config.swiglu_limit
        opened, raised = np.minimum(opened, limit), np.clip(raised, -limit, limit) + 1
        inner = opened / (1 + np.exp(-config.swiglu_alpha * opened)) * raised
    else:
        inner = activation(config.hidden_act, opened) * raised
    return linear(part, down, inner)


def activation(name: str, x: Array) -> Array:
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name == "gelu_pytorch_tanh"
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(part: Tensors, name: str, x: Array) -> Array:
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", np.float64(0))


def rms_norm(x: Array, weight: Array, config: DecoderConfig) -> Array:
    weight = weight + 1 if config.norm_offset else weight
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
