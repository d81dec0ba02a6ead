"""Golden encoders and encoder-decoders by a forward pass in plain NumPy that knows only configs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_configs import read_config
from safetensors.numpy import load_file

from moecc.families.bert import BertConfig
from moecc.families.encdec import EncDecConfig
from moecc.families.registry import CONFIGS
from moecc.families.switch_transformers import SwitchTransformersConfig

HERE = Path(__file__).parent
ENTRIES = json.loads((HERE / "manifest.json").read_text())["cases"]
BERTS = sorted(name for name, entry in ENTRIES.items() if entry["family"] == "bert")
T5S = sorted(name for name, e in ENTRIES.items() if issubclass(CONFIGS[e["family"]], EncDecConfig))

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]

ROUNDING = 2.0**-24 * (1 + 1e-6)


def load(name: str) -> tuple[Any, Tensors, dict[str, Array]]:
    tensors: Tensors = {}
    for path in sorted((HERE / name).glob("*.safetensors")):
        tensors |= {key: t.astype(np.float64) for key, t in load_file(path).items()}
    arrays = {path.stem: np.load(path) for path in (HERE / name).glob("*.npy")}
    return read_config(HERE / name), tensors, arrays


def close(found: Array, golden: Array) -> bool:
    return bool(np.all(np.abs(found - golden) <= ROUNDING * np.abs(golden) + 1e-12))


@pytest.mark.parametrize("name", T5S)
def test_plain_numpy_gives_the_golden_logits(name: str) -> None:
    config, tensors, arrays = load(name)
    assert close(t5(config, tensors, arrays["tokens"], arrays["decoder_tokens"]), arrays["logits"])


@pytest.mark.parametrize("name", BERTS)
def test_plain_numpy_gives_the_golden_hidden_states(name: str) -> None:
    config, tensors, arrays = load(name)
    assert close(bert(config, tensors, arrays["tokens"]), arrays["hidden"])


def t5(config: EncDecConfig, tensors: Tensors, tokens: Array, decoder_tokens: Array) -> Array:
    """Return logits [batch, seq, vocab] in float64."""
    memory = stack(config, tensors, "encoder", tokens, None)
    hidden = stack(config, tensors, "decoder", decoder_tokens, memory)
    if config.scale_outputs:
        hidden = hidden / math.sqrt(config.hidden_size)
    return hidden @ tensors.get("lm_head.weight", tensors["shared.weight"]).T


def stack(
    config: EncDecConfig, tensors: Tensors, name: str, tokens: Array, memory: Array | None
) -> Array:
    hidden = tensors["shared.weight"][tokens]
    seq = tokens.shape[1]
    behind = np.arange(seq)[:, None] - np.arange(seq)[None, :]
    buckets = np.vectorize(lambda d: bucket(config, int(d), memory is None))(behind)
    for number in range(config.layers(name)):
        at = f"{name}.block.{number}.layer."
        # umt5 has a table in every layer, the others that of the first.
        of = at if config.model_type == "umt5" else f"{name}.block.0.layer."
        bias = tensors[f"{of}0.SelfAttention.relative_attention_bias.weight"][buckets]
        if memory is not None:
            bias = np.where(behind[..., None] >= 0, bias, -np.inf)
        normed = rms_norm(hidden, tensors[f"{at}0.layer_norm.weight"], config)
        hidden = hidden + attend(config, tensors, f"{at}0.SelfAttention.", normed, normed, bias)
        if memory is not None:
            normed = rms_norm(hidden, tensors[f"{at}1.layer_norm.weight"], config)
            hidden = hidden + attend(
                config, tensors, f"{at}1.EncDecAttention.", normed, memory, np.zeros(())
            )
        at += "1." if memory is None else "2."
        normed = rms_norm(hidden, tensors[f"{at}layer_norm.weight"], config)
        hidden = hidden + feed_forward(config, tensors, at, normed)
    return rms_norm(hidden, tensors[f"{name}.final_layer_norm.weight"], config)


def bucket(config: EncDecConfig, behind: int, both: bool) -> int:
    count, offset = config.relative_attention_num_buckets, 0
    if both:
        count //= 2
        offset = count if behind < 0 else 0
        behind = abs(behind)
    behind = max(behind, 0)
    exact = count // 2
    if behind < exact:
        return offset + behind
    reach = config.relative_attention_max_distance / exact
    far = exact + int(math.log(behind / exact) / math.log(reach) * (count - exact) + 1e-9)
    return offset + min(far, count - 1)


def attend(
    config: EncDecConfig, tensors: Tensors, at: str, x: Array, memory: Array, bias: Array
) -> Array:
    def heads(y: Array, letter: str) -> Array:
        y = y @ tensors[f"{at}{letter}.weight"].T
        return y.reshape(*y.shape[:2], config.num_attention_heads, config.head_dim)

    scores = np.einsum("bqhd,bkhd->bqkh", heads(x, "q"), heads(memory, "k")) + bias
    weights = softmax(scores, 2)
    mixed = np.einsum("bqkh,bkhd->bqhd", weights, heads(memory, "v"))
    return mixed.reshape(*x.shape[:2], -1) @ tensors[f"{at}o.weight"].T


def feed_forward(config: EncDecConfig, tensors: Tensors, at: str, x: Array) -> Array:
    router = tensors.get(f"{at}mlp.router.classifier.weight")
    if router is None:
        return block(
            config,
            tensors,
            next(
                k for k in tensors if k.startswith(f"{at}") and k.endswith("wo.weight")
            ).removesuffix("wo.weight"),
            x,
        )
    assert isinstance(config, SwitchTransformersConfig)
    probabilities = softmax(x @ router.T, -1)
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        taken = dict.fromkeys(range(config.num_experts), 0)
        for token in range(x.shape[1]):
            expert = int(probabilities[row, token].argmax())
            taken[expert] += 1
            if taken[expert] <= config.expert_capacity:
                made = block(config, tensors, f"{at}mlp.experts.expert_{expert}.", x[row, token])
                out[row, token] = probabilities[row, token, expert] * made
    return out


def block(config: EncDecConfig, tensors: Tensors, at: str, x: Array) -> Array:
    if config.gated:
        inner = activation(config.hidden_act, x @ tensors[f"{at}wi_0.weight"].T)
        inner = inner * (x @ tensors[f"{at}wi_1.weight"].T)
    else:
        inner = activation(config.hidden_act, x @ tensors[f"{at}wi.weight"].T)
    return inner @ tensors[f"{at}wo.weight"].T


def bert(config: BertConfig, tensors: Tensors, tokens: Array) -> Array:
    """Return the last hidden states [batch, seq, embed] in float64."""
    tables = (tensors[f"embeddings.{word}_embeddings.weight"] for word in WORDS)
    words, types, positions = tables
    hidden = words[tokens] + types[0] + positions[: tokens.shape[1]]
    hidden = layer_norm(hidden, tensors, "embeddings.", config)
    for number in range(config.num_hidden_layers):
        at = f"encoder.layer.{number}."
        query, key, value = (
            linear(tensors, f"{at}attention.self.{word}", hidden).reshape(
                *hidden.shape[:2], config.num_attention_heads, -1
            )
            for word in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bqkh", query, key) / math.sqrt(query.shape[-1])
        mixed = np.einsum("bqkh,bkhd->bqhd", softmax(scores, 2), value).reshape(hidden.shape)
        mixed = linear(tensors, f"{at}attention.output.dense", mixed)
        hidden = layer_norm(hidden + mixed, tensors, f"{at}attention.output.", config)
        inner = activation(config.hidden_act, linear(tensors, f"{at}intermediate.dense", hidden))
        out = linear(tensors, f"{at}output.dense", inner)
        hidden = layer_norm(hidden + out, tensors, f"{at}output.", config)
    return hidden


WORDS = ("word", "token_type", "position")


def activation(name: str, x: Array) -> Array:
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    assert name == "gelu_pytorch_tanh"
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(tensors: Tensors, name: str, x: Array) -> Array:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def rms_norm(x: Array, weight: Array, config: EncDecConfig) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def layer_norm(x: Array, tensors: Tensors, at: str, config: BertConfig) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + config.layer_norm_eps)
    return normal * tensors[f"{at}LayerNorm.weight"] + tensors[f"{at}LayerNorm.bias"]


def softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)
