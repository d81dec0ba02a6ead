"""gemma3n and gemma4 in GGUF: decoders whose layers read embeddings of their own.

A gemma3n is read and not written: llama.cpp (b11739) cuts neurons off by a standard deviation over
n − 1 of them.  It has sizes and constants of the released models whatever a file says; files are
read with these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

from moecc.errors import Problem, Problems, nearest, quoted
from moecc.families.gemma4 import (
    FULL,
    SLIDING,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LayerInputsConfig,
    PairedRope,
)
from moecc.formats.gguf.config import (
    GROUPS,
    ROTATED,
    epsilon_of,
    refuse_the_rest,
    special_tokens,
    torch_dtype,
    vocabulary_size,
)
from moecc.formats.gguf.families import EMBEDDING, HEAD, ROPE_FACTORS, STORED_LAYER
from moecc.formats.gguf.header import MAX_LAYERS, GgufArray, GgufHeader, GgufKeys, Key, Written
from moecc.support.lazy import np
from moecc.support.text import with_article
from moecc.support.untyped import JsonDict
from moecc.types import F32, Array, tensor
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat, Index, Slice

INPUTS = "per_layer_token_embd.weight"
"""The table of the embeddings that layers read, with a row for each token of the vocabulary."""

_MODEL = {
    EMBEDDING: "model.embed_tokens",
    "output_norm.weight": "model.norm",
    HEAD: "lm_head",
    INPUTS: "model.embed_tokens_per_layer",
    "per_layer_model_proj.weight": "model.per_layer_model_projection",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm",
}
_STREAMS = {
    "altup_proj.weight": "model.altup_projections",
    "altup_unembd_proj.weight": "model.altup_unembed_projections",
}
"""Stacks of the matrices that Hugging Face numbers."""

_SHARED = {
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    **{f"attn_{letter}_norm": f"self_attn.{letter}_norm" for letter in "qk"},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **{f"ffn_{word}": f"mlp.{word}_proj" for word in ("gate", "up", "down")},
    "post_ffw_norm": "post_feedforward_layernorm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_GEMMA4 = {
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
}
_GEMMA4_ENDS = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
_GEMMA3N = {
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
_GEMMA3N_ENDS = {"altup_correct_scale.weight": "altup.correct_output_scale"}

# What llama.cpp (b11739) has as constants of a gemma3n.
_PERIOD, _WRITERS, _SPARSE_LAYERS, _SPARSITY = 5, 20, 10, 0.95
_CONSTANTS: Mapping[str, float] = {
    "streams": 4,
    "active_stream": 0,
    "laurel_rank": 64,
    "input_width": 256,
    "logit_softcap": 30.0,
}
UNROTATED = 1e30
"""What frequencies are divided by whose pairs are not rotated."""

PATTERN, SHARED_LAYERS = "attention.sliding_window_pattern", "attention.shared_kv_layers"
LOCAL_THETA, SPARSITIES = "rope.freq_base_swa", "activation_sparsity_scale"
WIDTHS = tuple(f"attention.{end}" for end in ("key_length", "value_length"))
SOFTCAP, INPUT_WIDTH = "final_logit_softcapping", "embedding_length_per_layer_input"


def layer_tensors(family: type[LayerInputsConfig]) -> dict[str, str]:
    """Return the names of a layer's tensors in GGUF with those in Hugging Face."""
    is_gemma4 = issubclass(family, Gemma4TextConfig)
    stems = _SHARED | (_GEMMA4 if is_gemma4 else _GEMMA3N)
    ends = _GEMMA4_ENDS if is_gemma4 else _GEMMA3N_ENDS
    return {f"{old}.weight": f"{new}.weight" for old, new in stems.items()} | ends


def hugging_face_name(name: str, family: type[LayerInputsConfig]) -> str | None:
    """Translate the name of a tensor that is not stacked; None if the family has none such."""
    if name in _MODEL:
        return f"{_MODEL[name]}.weight"
    match = STORED_LAYER.fullmatch(name)
    end = match and layer_tensors(family).get(match[2])
    return f"model.layers.{match[1]}.{end}" if match and end else None


# Write a gemma4.


def as_stored(config: Gemma4TextConfig) -> Gemma4TextConfig:
    """Return the config of the same function, whose layers have a row for each token."""
    return replace(config, input_vocab=config.vocab_size) if config.input_width else config


def gemma4_tensors(
    config: Gemma4TextConfig, tensors: Sequence[tuple[str, Expr]]
) -> dict[str, Expr]:
    """Return the tensors of a file by their names there, from those of Hugging Face."""
    ends = {new: old for old, new in layer_tensors(type(config)).items()}
    wholes = {f"{new}.weight": old for old, new in _MODEL.items()}
    stored: dict[str, Expr] = {}
    for name, expr in tensors:
        if name in wholes:
            stored[wholes[name]] = expr
        else:
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            assert match is not None, "a tensor of the family"
            stored[f"blk.{match[1]}.{ends[match[2]]}"] = expr
    if INPUTS in stored and config.input_vocab > config.vocab_size:
        table = stored[INPUTS]
        stored[INPUTS] = Slice(table, table.type.names[0], 0, config.vocab_size)
    divisors = tuple(Full(divisor, tensor(F32, pair=1)) for divisor in _divisors(config))
    stored[ROPE_FACTORS] = Concat(divisors, "pair")
    return stored


def _divisors(config: Gemma4TextConfig) -> list[float]:
    """Return the divisors of the rotary frequencies in layers without a window."""
    rope, width = config.rope, config.global_head_dim
    turned = rope.pairs(width)
    return [rope.factor] * turned + [UNROTATED] * (width // 2 - turned)


def gemma4_as_read(stored: Mapping[str, Expr]) -> dict[str, Expr]:
    """Return the tensors of a file as they are read back; the reverse of `gemma4_tensors`."""
    named = ((hugging_face_name(name, Gemma4TextConfig), expr) for name, expr in stored.items())
    return {name: expr for name, expr in named if name is not None}


def gemma4_keys(architecture: str, config: Gemma4TextConfig) -> list[Key]:
    """Return the keys of `architecture` for a config that `gemma4_misfits` does not object to."""
    layers = range(config.num_hidden_layers)
    window = next((w for w in config.sliding_windows if w), None)
    assert window is not None, "some layer has a window"
    counts, neurons = [config.heads_of(n)[0] for n in layers], [*map(config.block_width, layers)]
    values: dict[str, Written] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": neurons if len(set(neurons)) > 1 else neurons[0],
        "attention.head_count": config.num_attention_heads,
        GROUPS: counts if len(set(counts)) > 1 else counts[0],
        **dict.fromkeys((*WIDTHS, ROTATED), config.global_head_dim),
        **dict.fromkeys((f"{name}_swa" for name in (*WIDTHS, ROTATED)), config.head_dim),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": window,
        PATTERN: [config.has_window(layer) for layer in layers],
        SHARED_LAYERS: config.shared_layers,
        "rope.freq_base": config.rope.theta,
        LOCAL_THETA: config.local_rope.theta,
        INPUT_WIDTH: config.input_width,
        # Without the key llama.cpp has a cap of 30.
        SOFTCAP: config.logit_softcap or 0.0,
        "vocab_size": config.vocab_size,
    }
    if config.num_experts:
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.expert_intermediate_size,
        }
    return [Key(f"{architecture}.{name}", value) for name, value in values.items()]


def gemma4_misfits(where: str, config: Gemma4TextConfig) -> Iterator[Problem]:
    """Yield why llama.cpp would not compute the model of `config` from such a file."""
    if config.hidden_act != "gelu_pytorch_tanh":
        fault = "llama.cpp computes GELU's tanh approximation in this architecture"
        yield Problem(fault, where, "gelu_pytorch_tanh", f"the activation {config.hidden_act}")
    if config.attention_bias:
        fault = "llama.cpp reads no biases of attention in this architecture"
        yield Problem(fault, where, "no bias", "attention_bias true")
    windows = [config.has_window(layer) for layer in range(config.num_hidden_layers)]
    if not any(windows):
        fault = "llama.cpp ends where no layer has a window in this architecture"
        yield Problem(fault, where, f"{SLIDING} in some layer", f"{FULL} in all")
    elif (config.local_rope.share, config.local_rope.factor) != (1, 1):
        fault = "llama.cpp rotates whole heads, unscaled, in layers with a window"
        yield Problem(fault, where, "rope_type default", "proportional rotary positions")
    first = config.first_shared
    # b11739 takes the last layer but one for those with a window, and the last for the others.
    if config.shared_layers and windows[max(first - 2, 0) : first] != [True, False]:
        fault = "llama.cpp shares the keys of the last two layers that have some"
        expected = f"{SLIDING} in layer {first - 2}, {FULL} in layer {first - 1}"
        yield Problem(fault, where, expected, "other kinds of layers")


# Read a file.


def read_layer_inputs(
    header: GgufHeader,
    family: type[LayerInputsConfig],
    divisors: Array | None,
    problems: Problems,
) -> tuple[JsonDict, dict[str, str], list[str]]:
    """Return config.json, the names in Hugging Face of tensors, and the stacks among tensors.

    Args:
      header: that of the file.
      family: the family that its architecture stands for.
      divisors: [head_dim / 2], the content of ``rope_freqs.weight`` if there is one.
      problems: takes every error.
    """
    keys = GgufKeys(header, problems)
    config = _config(keys, header, family)
    is_gemma4 = issubclass(family, Gemma4TextConfig)
    config |= _gemma4(keys, header, config, divisors) if is_gemma4 else _gemma3n(keys, config)
    refuse_the_rest(keys)
    names: dict[str, str] = {}
    stacks: list[str] = []
    ends = [f"blk.0.{end}" for end in layer_tensors(family)]
    candidates = [*_MODEL, *(() if is_gemma4 else _STREAMS), *ends]
    for name, stored in header.tensors.items():
        if not is_gemma4 and name in _STREAMS:
            count = _CONSTANTS["streams"]
            if len(stored.shape) != 3 or stored.shape[0] != count - 1:
                where, shown = f"{header.path}, tensor {quoted(name)}", f"{list(stored.shape)}"
                expected = f"{count - 1} matrices"
                problems.add("not a stack of matrices", where=where, expected=expected, found=shown)
            stacks.append(name)
        elif (new := hugging_face_name(name, family)) is not None:
            names[name] = new
        elif not (is_gemma4 and name == ROPE_FACTORS):
            fault = f"{with_article(family.model_type)} has no tensor {quoted(name)}"
            problems.add(fault, where=header.path, hint=nearest(name[:100], candidates))
    return config, names, stacks


def _config(keys: GgufKeys, header: GgufHeader, family: type[LayerInputsConfig]) -> JsonDict:
    """Return the keys of config.json that both families have."""
    vocab, inputs = vocabulary_size(keys, header), header.tensors.get(INPUTS)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab,
        "hidden_size": keys.size("embedding_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": keys.size("attention.head_count"),
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": epsilon_of(keys, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in header.tensors,
        "attention_bias": False,
        "sliding_window": keys.size("attention.sliding_window"),
        "hidden_size_per_layer_input": _count(keys, INPUT_WIDTH, 0),
        "vocab_size_per_layer_input": vocab if inputs is None else inputs.shape[0],
        **special_tokens(header, vocab, keys.problems),
        "torch_dtype": torch_dtype(header.tensors),
    }


def _count(keys: GgufKeys, key: str, default: int) -> int:
    """Return a whole number of at least 0."""
    value = keys.value(key)
    if value is None or (type(value) is int and value >= 0):
        return default if value is None else int(value)
    keys.refuse(key, "not a usable number", expected="a whole number, 0 or above")
    return default


def _require(keys: GgufKeys, key: str, expected: float, fault: str) -> None:
    """Record a number that is stated and is not `expected`."""
    if keys.number(key, expected) != expected:
        keys.refuse(key, fault, expected=f"{expected:g}")


def _gemma4(
    keys: GgufKeys, header: GgufHeader, config: JsonDict, divisors: Array | None
) -> JsonDict:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    shared = _count(keys, SHARED_LAYERS, 0)
    windows = [bool(window) for window in keys.layers(PATTERN, layers, -1)]
    sizes: list[int] = []
    for end in ("", "_swa"):
        size = keys.size(f"{WIDTHS[0]}{end}")
        for key in (f"{WIDTHS[1]}{end}", f"{ROTATED}{end}"):
            _require(keys, key, size, "differs from the width of a head")
        sizes.append(size)
    counts = keys.layers(GROUPS, layers, heads)
    by_kind = [
        {c for c, w in zip(counts, windows, strict=False) if w is kind} for kind in (True, False)
    ]
    if max(map(len, by_kind)) > 1:
        keys.refuse(GROUPS, "not usable", expected="one number for all layers of a kind")
    full = min(by_kind[1], default=1)
    local = min(by_kind[0], default=full)
    # Values are keys in layers without a window where these have no matrix of values.
    writers = [
        n for n, has_window in enumerate(windows[: max(layers - shared, 0)]) if not has_window
    ]
    are_keys = bool(writers) and not any(
        f"blk.{n}.attn_v.weight" in header.tensors for n in writers
    )
    if full != local and not are_keys:
        keys.refuse(
            GROUPS, "transformers has one number unless values are keys", expected=f"{local}"
        )
    neurons = keys.layers("feed_forward_length", layers, 1)
    is_wide = len(set(neurons)) > 1
    if is_wide and neurons != [
        neurons[0] * (2 if n >= layers - shared else 1) for n in range(layers)
    ]:
        expected = "one width, twice that in layers that share keys"
        keys.refuse("feed_forward_length", "not usable", expected=expected)
    experts = _count(keys, "expert_count", 0)
    softcap = keys.number(SOFTCAP, 30.0)
    counts_of_experts = ("num_experts", "expert_count"), ("top_k_experts", "expert_used_count")
    width = ("moe_intermediate_size", "expert_feed_forward_length")
    rope = _rope(keys, sizes[0], divisors)
    return {
        "head_dim": sizes[1],
        "global_head_dim": sizes[0],
        "num_key_value_heads": local,
        "num_global_key_value_heads": full,
        "attention_k_eq_v": are_keys,
        "num_kv_shared_layers": shared,
        "layer_types": [SLIDING if window else FULL for window in windows],
        "intermediate_size": neurons[0],
        "use_double_wide_mlp": is_wide,
        "final_logit_softcapping": softcap or None,
        "rope_parameters": {
            FULL: rope.to_json(),
            SLIDING: PairedRope(keys.number(LOCAL_THETA, 10_000.0)).to_json(),
        },
        "enable_moe_block": experts > 0,
        **{new: keys.size(old) if experts else None for new, old in (*counts_of_experts, width)},
    }


def _rope(keys: GgufKeys, width: int, divisors: Array | None) -> PairedRope:
    """Return the rotary positions of layers without a window, whose divisors a file holds."""
    theta, where = keys.number("rope.freq_base", 10_000.0), f"{keys.where}, tensor {ROPE_FACTORS!r}"
    if divisors is None or len(divisors) != width // 2:
        count = "nothing" if divisors is None else f"{len(divisors)}"
        keys.problems.add(
            "the file lacks the divisors of the rotary frequencies", where=where,
            expected=f"{width // 2} for heads of width {width}", found=count,
        )  # fmt: skip
        return PairedRope(theta)
    turned = int(np.sum(divisors < UNROTATED / 10))
    factor = float(str(np.float32(divisors[0]))) if turned else 1.0
    expected = [factor] * turned + [UNROTATED] * (len(divisors) - turned)
    if not (np.allclose(divisors, expected, rtol=1e-6) and factor > 0):
        keys.problems.add(
            "config.json cannot express the divisors of the rotary frequencies", where=where,
            expected=f"one number for the first pairs, and {UNROTATED:g} for others",
            found=f"divisors from {divisors.min():g} to {divisors.max():g}",
        )  # fmt: skip
        return PairedRope(theta)
    share = 2 * turned / width
    if PairedRope(theta, share).pairs(width) != turned:
        share = math.nextafter(share, 1.0)
    return PairedRope(theta, share, factor)


def _gemma3n(keys: GgufKeys, config: JsonDict) -> JsonDict:
    """Return what llama.cpp computes with; a file that states something else is rejected."""
    # A config of more layers is rejected as any other.
    layers, family = min(config["num_hidden_layers"], MAX_LAYERS), Gemma3nTextConfig
    fault = "llama.cpp has another number whatever the file says"
    head_dim = keys.size(WIDTHS[0], max(config["hidden_size"] // config["num_attention_heads"], 1))
    for key in (WIDTHS[1], ROTATED):
        _require(keys, key, head_dim, "differs from the width of a head")
    stated = {
        "altup.num_inputs": "streams", "altup.active_idx": "active_stream",
        INPUT_WIDTH: "input_width", SOFTCAP: "logit_softcap",
    }  # fmt: skip
    for key, name in stated.items():
        _require(keys, key, _CONSTANTS[name], fault)
    shared = max(layers - _WRITERS, 0)
    _require(keys, SHARED_LAYERS, shared, fault)
    sparsities = _usual_sparsities(layers)
    _require_layers(keys, PATTERN, [float(window) for window in _usual_windows(layers)])
    _require_layers(keys, SPARSITIES, [_deviations(share) for share in sparsities])
    constants = {
        "laurel_rank" if name == "laurel_rank" else family.key(name): value
        for name, value in _CONSTANTS.items()
    }
    return {
        **constants,
        "head_dim": head_dim,
        "num_key_value_heads": keys.size(GROUPS, config["num_attention_heads"]),
        "num_kv_shared_layers": shared,
        "layer_types": [SLIDING if window else FULL for window in _usual_windows(layers)],
        "intermediate_size": [keys.size("feed_forward_length")] * layers,
        "activation_sparsity_pattern": sparsities,
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_local_base_freq": keys.number(LOCAL_THETA, 10_000.0),
    }


def _require_layers(keys: GgufKeys, key: str, expected: Sequence[float]) -> None:
    """Record an array of other numbers than llama.cpp computes with, whatever the file says."""
    stated = keys.array(key)
    is_usual = stated is None or (
        isinstance(stated, GgufArray)
        and stated.letter
        and stated.count == len(expected)
        and np.allclose(stated.numbers(), expected, rtol=1e-5)
    )
    if not is_usual:
        fault = "llama.cpp has other numbers whatever the file says"
        keys.refuse(key, fault, expected=", ".join(f"{n:.4g}" for n in expected[:12]))


def streams_of(name: str, expr: Expr) -> dict[str, Expr]:
    """Return the matrices of a stack by their names in Hugging Face."""
    axis = expr.type.names[0]
    count = expr.type[axis].fixed_size
    return {f"{_STREAMS[name]}.{n}.weight": Index(expr, axis, n) for n in range(count)}


def _deviations(share: float) -> float:
    """Return the quantile of a normal distribution that cuts off a share of the neurons."""
    return NormalDist().inv_cdf(share) if share else -math.inf


def _usual_windows(layers: int) -> list[bool]:
    return [(layer + 1) % _PERIOD != 0 for layer in range(layers)]


def _usual_sparsities(layers: int) -> list[float]:
    return [_SPARSITY if layer < _SPARSE_LAYERS else 0.0 for layer in range(layers)]
