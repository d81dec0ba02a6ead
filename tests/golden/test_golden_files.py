"""The golden files are what their manifest says, and mean what the typed configs say.

The second half evaluates every decoder's checkpoint with a forward pass in plain NumPy
(`plain_decoder.py`) that knows nothing but `parse_config`: if it gives the golden logits, then the
config holds all that a graph needs, and the golden values are not an accident of transformers'
code.  Encoders and encoder-decoders: `test_golden_encoders.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.families.decoder import BIASES, FEATURES, DecoderConfig
from moecc.families.gpt_oss import GptOssConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, decoders
from moecc.families.rope import RopeConfig
from moecc.testing.configs import read_config

from .plain_decoder import DEFAULT_MOE, MOE_NAMES, Array, Tensors, forward

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
CASES = sorted(MANIFEST["cases"])
DECODER_CASES = [name for name in CASES if MANIFEST["cases"][name]["family"] in decoders()]

# Half a unit in the last place of float32, which the golden logits are rounded to, and room for
# the order of float64 sums.
ROUNDING = 2.0**-24 * (1 + 1e-6)


def load(name: str) -> tuple[DecoderConfig, Tensors]:
    tensors: Tensors = {}
    for path in sorted((HERE / name).glob("*.safetensors")):
        tensors |= load_file(path)
    return read_config(HERE / name), tensors


def test_every_family_has_a_checkpoint_and_no_folder_is_left_over() -> None:
    assert {MANIFEST["cases"][name]["family"] for name in CASES} == CONFIGS.keys() - {"st_moe"}
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
    for feature in FEATURES.keys() - BIASES - {"qk_norm"}:
        neutral, _ = FEATURES[feature]
        # Norms elsewhere have other names, and lists of divisors another length.
        if getattr(config, feature) == neutral or feature == "norm_placement":
            continue
        if feature == "rotary_dim" and config.rope.type == "longrope":
            continue
        wrong.append((feature, without(config, feature, neutral)))
    # A norm right after the experts takes a factor of their sum away again.
    scaled = config.norm_placement != "after"
    if isinstance(config, MoeConfig) and config.renormalises() is None and scaled:
        flipped = replace(config, norm_topk_prob=not config.norm_topk_prob)
        wrong.append(("renormalisation", flipped))
    if isinstance(config, MoeConfig) and config.gate_scale != 1:
        wrong.append(("factor on the gates", replace(config, gate_scale=1.0)))
    if isinstance(config, GptOssConfig):
        wrong.append(("activation", replace(config, swiglu_alpha=1.0)))
        if config.swiglu_limit < 7:
            wrong.append(("limit", replace(config, swiglu_limit=7.0)))
    return wrong


def without(config: DecoderConfig, feature: str, neutral: object) -> DecoderConfig:
    """Return `config` without a feature, although its family has it."""
    wrong = copy.copy(config)
    object.__setattr__(wrong, feature, neutral)
    return wrong


def golden(name: str) -> tuple[Array, Array]:
    return np.load(HERE / name / "tokens.npy"), np.load(HERE / name / "logits.npy")


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    embed, width = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, embed)}
    shapes |= norm_shapes(config, "model.norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, embed)
    if config.head_bias:
        shapes["lm_head.bias"] = (config.vocab_size,)
    heads = config.num_attention_heads * width
    groups = config.num_key_value_heads * width
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        phi3 = config.model_type == "phi3"
        if phi3:
            shapes[f"{at}self_attn.qkv_proj.weight"] = (heads + 2 * groups, embed)
        for name, out in (("q", heads), ("k", groups), ("v", groups)):
            if not phi3:
                shapes[f"{at}self_attn.{name}_proj.weight"] = (out, embed)
            if config.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}self_attn.o_proj.weight"] = (embed, heads)
        if config.output_bias:
            shapes[f"{at}self_attn.o_proj.bias"] = (embed,)
        if config.qk_norm:
            sizes = (heads, groups) if config.qk_norm_across else (width, width)
            for name, size in zip("qk", sizes, strict=True):
                shapes[f"{at}self_attn.{name}_norm.weight"] = (size,)
        for name in NORMS[config.norm_placement]:
            shapes |= norm_shapes(config, f"{at}{name}_layernorm")
        if isinstance(config, GptOssConfig):
            shapes[f"{at}self_attn.sinks"] = (config.num_attention_heads,)
        shapes |= block_shapes(config, layer, at)
    return shapes


def norm_shapes(config: DecoderConfig, name: str) -> dict[str, tuple[int, ...]]:
    ends = ("weight", "bias") if config.layer_norm else ("weight",)
    return {f"{name}.{end}": (config.hidden_size,) for end in ends}


NORMS = {
    "before": ("input", "post_attention"),
    "after": ("post_attention", "post_feedforward"),
    "around": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}


def block_shapes(config: DecoderConfig, layer: int, at: str) -> dict[str, tuple[int, ...]]:
    embed = config.hidden_size
    if config.model_type == "phi3":
        width = config.intermediate_size
        fused = f"{at}mlp.gate_up_proj.weight"
        return {fused: (2 * width, embed), f"{at}mlp.down_proj.weight": (embed, width)}
    if not isinstance(config, MoeConfig) or not config.sparse_layers[layer]:
        shapes = swiglu_shapes(f"{at}mlp.", ("gate_proj", "up_proj", "down_proj"), embed, config)
        if config.mlp_bias:
            biases = {key.replace(".weight", ".bias"): (shape[0],) for key, shape in shapes.items()}
            shapes |= biases
        return shapes
    count, width = config.num_experts, config.expert_intermediate_size
    prefix, router, names, shared = MOE_NAMES.get(config.model_type, DEFAULT_MOE)
    at += prefix
    shapes = {f"{at}{router}.weight": (count, embed)}
    if config.model_type == "granitemoe":
        shapes[f"{at}input_linear.weight"] = (count, 2 * width, embed)
        shapes[f"{at}output_linear.weight"] = (count, embed, width)
        return shapes
    if isinstance(config, GptOssConfig):
        shapes[f"{at}{router}.bias"] = (count,)
        for name, ins, out in (("gate_up", embed, 2 * width), ("down", width, embed)):
            shapes[f"{at}experts.{name}_proj"] = (count, ins, out)
            shapes[f"{at}experts.{name}_proj_bias"] = (count, out)
        return shapes
    for expert in range(count):
        shapes |= swiglu_shapes(f"{at}experts.{expert}.", names, embed, width)
    if config.shared_expert_intermediate_size is not None:
        width = config.shared_expert_intermediate_size
        shapes |= swiglu_shapes(f"{at}{shared}.", names, embed, width)
        if config.shared_gate:
            shapes[f"{at}shared_expert_gate.weight"] = (1, embed)
    biases = {"glm4_moe": "gate.e", "ernie4_5_moe": "moe_statics.e"}
    if config.model_type in biases:
        rows = (1,) if config.model_type == "ernie4_5_moe" else ()
        name = f"{at}{biases[config.model_type]}_score_correction_bias"
        shapes[name] = (*rows, count)
    return shapes


def swiglu_shapes(
    at: str, names: tuple[str, ...], embed: int, width: int | DecoderConfig
) -> dict[str, tuple[int, ...]]:
    mlp = width if isinstance(width, int) else width.intermediate_size
    gate, up, down = (f"{at}{name}.weight" for name in names)
    return {gate: (mlp, embed), up: (mlp, embed), down: (embed, mlp)}
