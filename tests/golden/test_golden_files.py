"""The golden files are what their manifest says, and mean what the typed configs say.

The second half evaluates every decoder's checkpoint with a forward pass in plain NumPy that knows
nothing but `parse_config`: if it gives the golden logits, then the config holds all that a graph
needs, and the golden values are not an accident of transformers' code.  Encoders and
encoder-decoders: `test_golden_encoders.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.families.configs import (
    DecoderConfig,
    MixtralConfig,
    MoeConfig,
    RopeConfig,
    attention_factor,
    read_config,
    rotary_frequencies,
)

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
CASES = sorted(MANIFEST["cases"])
DECODERS = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"}
FAMILIES = DECODERS | {"t5", "switch_transformers", "bert"}
DECODER_CASES = [name for name in CASES if MANIFEST["cases"][name]["family"] in DECODERS]

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]

# Half a unit in the last place of float32, which the golden logits are rounded to, and room for
# the order of float64 sums.
ROUNDING = 2.0**-24 * (1 + 1e-6)


def load(name: str) -> tuple[DecoderConfig, Tensors]:
    tensors: Tensors = {}
    for path in sorted((HERE / name).glob("*.safetensors")):
        tensors |= load_file(path)
    return read_config(HERE / name), tensors


def test_every_family_has_a_checkpoint_and_no_folder_is_left_over() -> None:
    assert {MANIFEST["cases"][name]["family"] for name in CASES} == FAMILIES
    folders = {path.name for path in HERE.iterdir() if (path / "config.json").exists()}
    assert folders == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_the_manifest(name: str) -> None:
    recorded = MANIFEST["cases"][name]["sha256"]
    paths = {path.name: path for path in (HERE / name).iterdir()}
    assert set(paths) == set(recorded)
    assert sum(path.stat().st_size for path in paths.values()) < 150_000
    for file, digest in recorded.items():
        assert hashlib.sha256(paths[file].read_bytes()).hexdigest() == digest, file


@pytest.mark.parametrize("name", CASES)
def test_both_versions_of_transformers_agree(name: str) -> None:
    differences = MANIFEST["cases"][name]["differences"]
    assert {version.split(".")[0] for version in differences} == {
        "transformers 4",
        "transformers 5",
    }
    for found in differences.values():
        assert float(found["float64"]) <= 6e-8
        assert float(found["float32"]) <= 1e-6


@pytest.mark.parametrize("name", DECODER_CASES)
def test_tensors_have_the_shapes_that_the_config_says(name: str) -> None:
    config, tensors = load(name)
    expected = expected_shapes(config)
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected
    stored = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[str(config.dtype)]
    for key, tensor in tensors.items():
        assert tensor.dtype == stored
        assert np.unique(tensor).size > 1, f"{key} is constant"
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
            assert not np.array_equal(tensor, tensor.T), f"{key} is symmetric"


@pytest.mark.parametrize("name", CASES)
def test_an_index_lists_exactly_what_the_shards_hold(name: str) -> None:
    shards = sorted((HERE / name).glob("*.safetensors"))
    held = {key: path.name for path in shards for key in load_file(path)}
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        return
    index = json.loads((HERE / name / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == held


def test_some_checkpoints_are_sharded_square_and_in_both_spellings() -> None:
    stated = {name: json.loads((HERE / name / "config.json").read_text()) for name in CASES}
    assert {"rope_theta" in config for config in stated.values()} == {True, False}
    assert {"rope_parameters" in config for config in stated.values()} == {True, False}
    assert sum((HERE / name / "model.safetensors.index.json").exists() for name in CASES) >= 3
    for name in (name for name in DECODER_CASES if "square" in name):
        config, _ = load(name)
        shapes = expected_shapes(config)
        attention_shapes = {shapes[key] for key in shapes if key.endswith("_proj.weight")}
        embed = config.hidden_size
        assert (embed, embed) in attention_shapes
        assert config.num_attention_heads * config.head_dim == embed == config.vocab_size
        assert config.intermediate_size in (embed, embed // 2)
        assert getattr(config, "num_experts", embed) == embed


@pytest.mark.parametrize("name", DECODER_CASES)
def test_tokens_and_logits_fit(name: str) -> None:
    config, _ = load(name)
    tokens, logits = golden(name)
    assert tokens.dtype == np.int64
    assert tokens.shape == (2, 16)
    assert tokens.min() >= 0
    assert tokens.max() < config.vocab_size
    assert logits.dtype == np.float32
    assert logits.shape == (*tokens.shape, config.vocab_size)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", DECODER_CASES)
def test_plain_numpy_gives_the_golden_logits(name: str) -> None:
    config, tensors = load(name)
    tokens, logits = golden(name)
    found = forward(config, tensors, tokens)
    assert np.all(np.abs(found - logits) <= ROUNDING * np.abs(logits) + 1e-12)


@pytest.mark.parametrize("name", DECODER_CASES)
def test_golden_logits_notice_a_wrong_reading(name: str) -> None:
    config, tensors = load(name)
    tokens, logits = golden(name)
    for what, wrong in misreadings(config):
        found = forward(wrong, tensors, tokens)
        assert np.abs(found - logits).max() > 1e-3 * np.abs(logits).max(), what
    for key, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] and ".0." in key:
            found = forward(config, {**tensors, key: tensor.T}, tokens)
            assert np.abs(found - logits).max() > 1e-3 * np.abs(logits).max(), key


def misreadings(config: DecoderConfig) -> list[tuple[str, DecoderConfig]]:
    """Return configs that a careless reader could take this one for."""
    wrong: list[tuple[str, DecoderConfig]] = []
    plain = RopeConfig(theta=config.rope.theta)
    if config.rope != plain:
        wrong.append(("scaling ignored", replace(config, rope=plain)))
    theta = replace(config.rope, theta=10_000.0)
    wrong.append(("default theta", replace(config, rope=theta)))
    windows = config.sliding_windows
    if any(windows):
        none = (None,) * len(windows)
        longer = tuple(window and window + 1 for window in windows)
        wrong.append(("window ignored", replace(config, sliding_windows=none)))
        wrong.append(("window one too long", replace(config, sliding_windows=longer)))
    if isinstance(config, MoeConfig) and not isinstance(config, MixtralConfig):
        flipped = replace(config, norm_topk_prob=not config.norm_topk_prob)
        wrong.append(("renormalisation", flipped))
    return wrong


def golden(name: str) -> tuple[Array, Array]:
    return np.load(HERE / name / "tokens.npy"), np.load(HERE / name / "logits.npy")


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    embed, width = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, embed)}
    shapes["model.norm.weight"] = (embed,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, embed)
    heads = config.num_attention_heads * width
    groups = config.num_key_value_heads * width
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for name, out in (("q", heads), ("k", groups), ("v", groups)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (out, embed)
            if config.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}self_attn.o_proj.weight"] = (embed, heads)
        if config.output_bias:
            shapes[f"{at}self_attn.o_proj.bias"] = (embed,)
        if config.qk_norm:
            shapes |= {f"{at}self_attn.{name}_norm.weight": (width,) for name in "qk"}
        shapes[f"{at}input_layernorm.weight"] = (embed,)
        shapes[f"{at}post_attention_layernorm.weight"] = (embed,)
        shapes |= block_shapes(config, layer, at)
    return shapes


def block_shapes(config: DecoderConfig, layer: int, at: str) -> dict[str, tuple[int, ...]]:
    embed = config.hidden_size
    if not isinstance(config, MoeConfig) or not config.sparse_layers[layer]:
        shapes = swiglu_shapes(f"{at}mlp.", ("gate_proj", "up_proj", "down_proj"), embed, config)
        if config.mlp_bias:
            biases = {key.replace(".weight", ".bias"): (shape[0],) for key, shape in shapes.items()}
            shapes |= biases
        return shapes
    mixtral = isinstance(config, MixtralConfig)
    at += "block_sparse_moe." if mixtral else "mlp."
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    shapes = {f"{at}gate.weight": (config.num_experts, embed)}
    for expert in range(config.num_experts):
        width = config.expert_intermediate_size
        shapes |= swiglu_shapes(f"{at}experts.{expert}.", names, embed, width)
    if config.shared_expert_intermediate_size is not None:
        width = config.shared_expert_intermediate_size
        shapes |= swiglu_shapes(f"{at}shared_expert.", names, embed, width)
        shapes[f"{at}shared_expert_gate.weight"] = (1, embed)
    return shapes


def swiglu_shapes(
    at: str, names: tuple[str, ...], embed: int, width: int | DecoderConfig
) -> dict[str, tuple[int, ...]]:
    mlp = width if isinstance(width, int) else width.intermediate_size
    gate, up, down = (f"{at}{name}.weight" for name in names)
    return {gate: (mlp, embed), up: (mlp, embed), down: (embed, mlp)}


def forward(config: DecoderConfig, tensors: Tensors, tokens: Array) -> Array:
    """Return logits [batch, seq, vocab] in float64."""
    weights = {key: tensor.astype(np.float64) for key, tensor in tensors.items()}
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding[tokens]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        part = {key.removeprefix(at): w for key, w in weights.items() if key.startswith(at)}
        normed = rms_norm(hidden, part["input_layernorm.weight"], config)
        hidden = hidden + attention(config, part, normed, config.sliding_windows[layer])
        normed = rms_norm(hidden, part["post_attention_layernorm.weight"], config)
        sparse = isinstance(config, MoeConfig) and config.sparse_layers[layer]
        hidden = hidden + (moe if sparse else dense)(config, part, normed)  # type: ignore[operator]
    hidden = rms_norm(hidden, weights["model.norm.weight"], config)
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    return hidden @ head.T


def attention(config: DecoderConfig, part: Tensors, x: Array, window: int | None) -> Array:
    batch, seq, _ = x.shape
    query, key, value = (
        linear(part, f"self_attn.{name}_proj", x).reshape(batch, seq, -1, config.head_dim)
        for name in "qkv"
    )
    if config.qk_norm:
        query = rms_norm(query, part["self_attn.q_norm.weight"], config)
        key = rms_norm(key, part["self_attn.k_norm.weight"], config)
    query, key = rotate(config, query), rotate(config, key)
    repeats = config.num_attention_heads // config.num_key_value_heads
    key, value = np.repeat(key, repeats, axis=2), np.repeat(value, repeats, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(config.head_dim)
    distance = np.arange(seq)[:, None] - np.arange(seq)[None, :]
    seen = (distance >= 0) & (distance < (window or seq))
    weights = softmax(np.where(seen, scores, -np.inf))
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, seq, -1)
    return linear(part, "self_attn.o_proj", mixed)


def rotate(config: DecoderConfig, x: Array) -> Array:
    seq, length = x.shape[1], config.max_position_embeddings
    frequencies = rotary_frequencies(
        config.rope, config.head_dim, max_position_embeddings=length, length=seq
    )
    angles = np.arange(seq)[:, None] * np.array(frequencies)
    cos = np.cos(angles)[None, :, None] * attention_factor(config.rope)
    sin = np.sin(angles)[None, :, None] * attention_factor(config.rope)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def dense(config: DecoderConfig, part: Tensors, x: Array) -> Array:
    return swiglu(config, part, "mlp.", ("gate_proj", "up_proj", "down_proj"), x)


def moe(config: MoeConfig, part: Tensors, x: Array) -> Array:
    mixtral = isinstance(config, MixtralConfig)
    at = "block_sparse_moe." if mixtral else "mlp."
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    probabilities = softmax(linear(part, f"{at}gate", x))
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    chosen = np.argsort(order, axis=-1) < config.experts_per_token
    gates = np.where(chosen, probabilities, 0)
    if config.norm_topk_prob:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    total = np.zeros_like(x)
    for expert in range(config.num_experts):
        out = swiglu(config, part, f"{at}experts.{expert}.", names, x)
        total += gates[..., expert, None] * out
    if config.shared_expert_intermediate_size is not None:
        gate = 1 / (1 + np.exp(-linear(part, f"{at}shared_expert_gate", x)))
        total += gate * swiglu(config, part, f"{at}shared_expert.", names, x)
    return total


def swiglu(
    config: DecoderConfig, part: Tensors, at: str, names: tuple[str, ...], x: Array
) -> Array:
    gate, up, down = (f"{at}{name}" for name in names)
    inner = activation(config.hidden_act, linear(part, gate, x)) * linear(part, up, x)
    return linear(part, down, inner)


def activation(name: str, x: Array) -> Array:
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name == "gelu_pytorch_tanh"
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(part: Tensors, name: str, x: Array) -> Array:
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", np.float64(0))


def rms_norm(x: Array, weight: Array, config: DecoderConfig) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
