"""Translate the metadata of a GGUF file to config.json.

Every key of the architecture must be understood: an unknown key may change what the model
computes, and is rejected rather than dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from moecc.errors import InputError, Problem, Problems
from moecc.families.config import GgufFacts
from moecc.families.decoder import LATENT_EPS, DecoderConfig
from moecc.families.mixture import MoeConfig
from moecc.formats.gguf.families import (
    EMBEDDING,
    HEAD,
    LLAMA3_FACTORS,
    GgufFamily,
)
from moecc.formats.gguf.header import GgufHeader, GgufKeys, Key, StoredTensor, Written, token_id
from moecc.support.lazy import np
from moecc.support.untyped import Json, JsonDict
from moecc.types import Array, Doubles

# Translate the rotary embedding between a GGUF file and config.json.
#
# GGUF states the base period and a scaling by name, except for Llama 3's, of which only the
# resulting divisor of each frequency is stored, as the tensor ``rope_freqs.weight``.

# The length that Llama 3.1 to 3.3 were trained with comes first.
_OLD_LENGTHS = (8192, *(1 << power for power in range(4, 21) if power != 13))
_TOLERANCE = 1e-5
YARN_WEIGHT = "rope.scaling.yarn_log_multiplier"
_YARN_DEFAULTS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    YARN_WEIGHT: 0.0,
}
_BETAS = {"beta_fast": 32, "beta_slow": 1}
"""The bounds of YaRN, as b11739 has them: it reads the keys of others, and ignores them."""
_TYPES = ("none", "linear", "yarn")


def read_rope(
    keys: GgufKeys, context_length: int, divisors: Array | None, *, scales_scores: bool = False
) -> JsonDict:
    """Return ``rope_theta`` and ``rope_scaling``; what config.json cannot express is a problem.

    Args:
      keys: the keys of the file.
      context_length: the longest text.
      divisors: [head_dim / 2], the content of ``rope_freqs.weight`` if there is one.
      scales_scores: whether YaRN has a factor on scores, as with latent attention.
    """
    theta = keys.number("rope.freq_base", 10_000.0)
    scaling = _stated(keys, context_length, scales_scores=scales_scores)
    if divisors is not None and not np.all(divisors == 1):
        if scaling is not None:
            keys.refuse("rope.scaling.type", "the file also has the divisors of Llama 3's scaling")
        scaling = _llama3(keys, theta, divisors)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _stated(keys: GgufKeys, context_length: int, *, scales_scores: bool) -> JsonDict | None:
    older = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", 0.0) or older
    kind = keys.text("rope.scaling.type", "linear")
    original = keys.size("rope.scaling.original_context_length", context_length)
    yarn = {name: keys.number(f"rope.scaling.yarn_{name}", None) for name in _BETAS}
    weight = keys.number(YARN_WEIGHT, 0.0) if scales_scores else 0.0
    for name, neutral in _YARN_DEFAULTS.items():
        if name == YARN_WEIGHT and scales_scores:
            continue
        if keys.number(name, neutral) != neutral:
            keys.refuse(name, "moecc does not know this scaling", expected=f"{neutral}")
    if kind not in _TYPES:
        keys.refuse("rope.scaling.type", "not supported", expected=f"one of {', '.join(_TYPES)}")
    if kind == "yarn":
        stated = {name: beta for name, beta in yarn.items() if beta is not None}
        if scales_scores:
            # The converter states a tenth, and both weights are the same.
            stated |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * weight, 7))
        return {
            "rope_type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": original,
            **stated,
        }
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3(keys: GgufKeys, theta: float, divisors: Array) -> JsonDict | None:
    """Find the parameters that yield these divisors.

    Only the ratios of the old length to the two wavelength factors determine them, so with the
    published factors 1 and 4 only the length is unknown, and a solution is exact.
    """
    factor = float(divisors.max())
    usable = bool(np.all(np.isfinite(divisors)) and divisors.min() >= 1 and theta > 0)
    for (low, high), length in product(LLAMA3_FACTORS, _OLD_LENGTHS if usable else ()):
        expected = _llama3_divisors(theta, len(divisors), factor, length, (low, high))
        if np.allclose(divisors, expected, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(factor))),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    keys.problems.add(
        "config.json cannot express the divisors of the rotary frequencies",
        where=f"{keys.where}, tensor 'rope_freqs.weight'",
        expected="those of Llama 3, with low_freq_factor 1 and high_freq_factor 4 or 1",
        found=f"divisors from {divisors.min():g} to {divisors.max():g}",
    )
    return None


def _llama3_divisors(
    theta: float, count: int, factor: float, length: int, ends: tuple[float, float]
) -> Doubles:
    """Return the divisors that Llama 3.1 applies to each of `count` frequencies."""
    low, high = ends
    frequencies = theta ** (-np.arange(count) / count)
    turns = length * frequencies / (2 * math.pi)
    between = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else turns > low
    share = np.asarray(between, np.float64)
    divisors: Doubles = 1 / ((1 - share) / factor + share)
    return divisors


def rope_keys(config: Json) -> dict[str, int | float | str]:
    """Return the keys, without the architecture's name, of the rotary embedding of a config."""
    keys: dict[str, int | float | str] = {"rope.freq_base": float(config["rope_theta"])}
    scaling: Json = config["rope_scaling"] or {}
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return keys
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        if scaling.get("mscale_all_dim"):
            keys[YARN_WEIGHT] = 0.1 * scaling["mscale_all_dim"]
        stated = {name: scaling[name] for name in _BETAS if scaling.get(name) is not None}
        keys |= {f"rope.scaling.yarn_{name}": float(beta) for name, beta in stated.items()}
    return keys


def rotary_divisors(config: Json) -> list[float] | None:
    """Return the content of ``rope_freqs.weight`` for a config, or None if it needs none."""
    scaling: Json = config["rope_scaling"] or {}
    if scaling.get("rope_type") != "llama3":
        return None
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    ends = scaling["low_freq_factor"], scaling["high_freq_factor"]
    count = config["head_dim"] // 2
    divisors = _llama3_divisors(config["rope_theta"], count, factor, length, ends)
    values: list[float] = divisors.tolist()
    return values


_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
"""Keys that change what a model computes, with the values at which they have no effect."""

UNNORMALISED = 128
"""The experts of the one llama4 in which llama.cpp normalises no queries and keys."""

IN_CHUNKS = {True: "chunked_attention", False: "full_attention"}
GROUPS, ROTATED = "attention.head_count_kv", "rope.dimension_count"
_INERT = ("rope.scaling.finetuned", "tensor_data_layout")
_TORCH_ORDER = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """The sizes that determine the row order in a file."""

    heads: int
    groups: int
    head_dim: int
    rotated: int


def make_config(
    header: GgufHeader, family: GgufFamily, divisors: Array | None, problems: Problems
) -> tuple[JsonDict, HeadSizes]:
    """Return config.json and the sizes of a head; every error goes to `problems`."""
    keys = GgufKeys(header, problems)
    hidden, context = keys.size("embedding_length"), keys.size("context_length")
    sizes = _head_sizes(keys, hidden, family)
    vocab = vocabulary_size(keys, header)
    config: JsonDict = {
        "architectures": [family.config.architecture],
        "model_type": family.config.model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        family.config.key("intermediate_size"): keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
        family.config.key("hidden_act"): family.activation,
        "max_position_embeddings": context,
        family.config.key("rms_norm_eps"): epsilon_of(
            keys, family.epsilon_key, family.config.fixed.get("rms_norm_eps")
        ),
        "tie_word_embeddings": HEAD not in header.tensors,
        **read_rope(keys, context, divisors, scales_scores=family.has("latent")),
        **{
            k: any(n.endswith(f".{end}") for n in header.tensors)
            for k, end in family.flags().items()
        },
        **_experts(keys, family, header.tensors),
        **_further(keys, family, sizes),
        **special_tokens(header, vocab, problems),
        "torch_dtype": torch_dtype(header.tensors),
        **dict(family.facts.states),
    }
    config.pop("", None)  # an activation or epsilon that no key states
    refuse_the_rest(keys)
    return config, sizes


def _experts(keys: GgufKeys, family: GgufFamily, tensors: Mapping[str, StoredTensor]) -> JsonDict:
    """Return the keys of the experts: their number in every spelling, widths, gates."""
    mixture = family.mixture
    if mixture is None:
        return {}
    config: JsonDict = dict.fromkeys(mixture.experts_keys, keys.size("expert_count"))
    config[mixture.key("experts_per_token")] = keys.size("expert_used_count")
    width = 0
    if mixture.has_expert_width():
        width = keys.size("expert_feed_forward_length")
        config[mixture.key("expert_intermediate_size")] = width
    if family.facts.renormalises is not None and "norm_topk_prob" in mixture.defaults:
        config["norm_topk_prob"] = family.facts.renormalises
    if not mixture.has_shared_expert:
        return config
    stored = [t for n, t in tensors.items() if n.endswith("ffn_gate_shexp.weight")]
    if mixture.shared_count_key:
        for name in ("expert_shared_count", "expert_shared_feed_forward_length"):
            keys.value(name)
        config[mixture.shared_count_key] = stored[0].shape[0] // width if stored and width else 0
    else:
        size = keys.size("expert_shared_feed_forward_length", stored[0].shape[0] if stored else 1)
        config[mixture.key("shared_expert_intermediate_size")] = size
    return config


def _further(keys: GgufKeys, family: GgufFamily, sizes: HeadSizes) -> JsonDict:
    """Return what else the architecture states."""
    config: JsonDict = {}
    facts = family.facts
    for name, key in facts.keys:
        config[key] = keys.value(name)
        if config[key] is None:
            keys.refuse(name, "the file does not state this", expected="a value")
            del config[key]
    for name, key, default in facts.optional_keys:
        stated = keys.value(name)
        config[key] = default if stated is None else stated
    for name, value in facts.fixed:
        if keys.value(name) != value:
            fault = "moecc does not know this variant of the architecture"
            keys.refuse(name, fault, expected=str(value))
    if facts.local_theta:
        config["rope_local_base_freq"] = keys.number("rope.freq_base_swa", facts.local_theta)
    if facts.score_layers:
        is_wide = keys.size("block_count") == facts.score_layers
        width = keys.size("embedding_length") // sizes.heads if is_wide else sizes.head_dim
        config["query_pre_attn_scalar"] = width
    if facts.no_rope_step:
        config["no_rope_layer_interval"] = facts.no_rope_step
    if family.has("delta"):
        config |= _delta_sizes(keys)
    if family.has("latent"):
        config |= _latent_sizes(keys, sizes)
    elif family.has("rotary_dim"):
        config["partial_rotary_factor"] = sizes.rotated / sizes.head_dim
    if family.has("attention_chunks"):
        config["use_qk_norm"] = keys.size("expert_count") != UNNORMALISED
    if family.has("conv_taps"):
        counts = keys.layers(GROUPS, keys.size("block_count"), sizes.groups)
        config["layer_types"] = ["full_attention" if count else "conv" for count in counts]
    return config


def _delta_sizes(keys: GgufKeys) -> JsonDict:
    """Return the sizes of gated delta rules, whose heads all have one width in a file."""
    width, heads = keys.size("ssm.state_size"), keys.size("ssm.time_step_rank")
    if keys.size("ssm.inner_size", width * heads) != width * heads:
        expected = f"{width * heads}, for {heads} heads of values"
        keys.refuse(
            "ssm.inner_size", "heads of another width than those of keys", expected=expected
        )
    keys.used.add(SECTIONS)
    return {
        "full_attention_interval": keys.size("full_attention_interval", 4),
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "linear_num_key_heads": keys.size("ssm.group_count"),
        "linear_num_value_heads": heads,
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), width),
    }


SECTIONS = "rope.dimension_sections"
"""Which entries are rotated by the positions in time, height and width, all the same in texts."""


def _delta_keys(family: GgufFamily, config: Json) -> dict[str, Written]:
    width, heads = config["linear_value_head_dim"], config["linear_num_value_heads"]
    # transformers' default; llama.cpp refuses files of qwen35 without them.
    # It ends where they are longer than a head; positions of a text are the same in all of them.
    usual = (11, 11, 10, 0) if config["head_dim"] >= 32 else (1, 1, 1, 0)
    sections = {} if family.config.names.delta_by_group else {SECTIONS: usual}
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": width,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": width * heads,
        "ssm.group_count": config["linear_num_key_heads"],
        "full_attention_interval": _interval(config["layer_types"]) or 1,
        **sections,
    }


def _interval(kinds: Sequence[str]) -> int | None:
    """Return n if every n-th layer, and no other, has attention; None if there is no such n."""
    full = [kind == "full_attention" for kind in kinds]
    for n in range(1, len(full) + 2):
        if full == [layer % n == 0 for layer in range(1, len(full) + 1)]:
            return n
    return None


def _delta_misfits(where: str, config: Json) -> Iterator[Problem]:
    """Yield where llama.cpp has other gated delta rules than the config."""
    if "linear_attention" not in config["layer_types"]:
        fault = "llama.cpp has layers with gated delta rules in this architecture"
        yield Problem(fault, where, "some", "attention in all layers", "write a folder instead")
        return
    if _interval(config["layer_types"]) is None:
        fault = "a GGUF file says that every so many layers have attention"
        yield Problem(fault, where, found="other layers", hint="write a folder instead")
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        fault = "llama.cpp has heads of one width in gated delta rules"
        shown = f"{config['linear_key_head_dim']} and {config['linear_value_head_dim']}"
        yield Problem(fault, where, found=shown, hint="write a folder instead")


def _latent_sizes(keys: GgufKeys, sizes: HeadSizes) -> JsonDict:
    """Return the sizes of latent attention, whose file states those of the absorbed form.

    There queries and keys have the width of the latent vector and of what is rotated, one key
    serves all heads, and its values are the latent vector.
    """
    rank = keys.size("attention.kv_lora_rank")
    absorbed = {GROUPS: 1, "attention.key_length": rank + sizes.rotated}
    for name, size in {**absorbed, "attention.value_length": rank}.items():
        if keys.size(name, size) != size:
            keys.refuse(name, "not the size of absorbed latent attention", expected=f"{size}")
    if keys.number("attention.layer_norm_rms_epsilon", LATENT_EPS) != LATENT_EPS:
        # llama.cpp has one number for all norms.
        fault = "transformers adds 1e-06 in the norms of latent vectors, and llama.cpp this"
        keys.refuse("attention.layer_norm_rms_epsilon", fault, expected="1e-06")
    return {
        "head_dim": sizes.rotated,
        "qk_nope_head_dim": sizes.head_dim - sizes.rotated,
        "qk_rope_head_dim": sizes.rotated,
        "kv_lora_rank": rank,
        "v_head_dim": keys.size("attention.value_length_mla"),
    }


def _latent_keys(config: Json) -> dict[str, Written]:
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        GROUPS: 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotary,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotary,
        "attention.value_length_mla": config["v_head_dim"],
        ROTATED: rotary,
    }


def _head_sizes(keys: GgufKeys, hidden: int, family: GgufFamily) -> HeadSizes:
    heads = keys.size("attention.head_count")
    if family.has("latent"):
        head_dim, rotated = keys.size("attention.key_length_mla"), keys.size(ROTATED)
        return HeadSizes(heads, heads, head_dim, rotated)
    if family.has("conv_taps"):
        # A layer with a convolution has no heads.
        counts = set(keys.layers(GROUPS, keys.size("block_count"), heads)) - {0}
        if len(counts) != 1:
            keys.refuse(GROUPS, "not usable", expected="one number, and 0 for convolutions")
        groups = max(counts, default=1)
    else:
        groups = keys.size(GROUPS, heads)
    head_dim = keys.size("attention.key_length", max(hidden // heads, 1))
    if hidden % heads and keys.value("attention.key_length") is None:
        keys.refuse("attention.head_count", f"does not divide the width {hidden:,}")
    rotated = keys.size(ROTATED, head_dim)
    widths = {"attention.value_length": keys.size("attention.value_length", head_dim)}
    if not family.has("rotary_dim"):
        widths[ROTATED] = rotated
    for key, size in widths.items():
        if size != head_dim:
            keys.refuse(key, "differs from the width of a head", expected=f"{head_dim}")
    return HeadSizes(heads, groups, head_dim, rotated)


def vocabulary_size(keys: GgufKeys, header: GgufHeader) -> int:
    """Return the number of tokens, which is that of the embedding's rows."""
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        problem = "the file has no token embedding"
        keys.problems.add(problem, where=keys.where, expected=f"a tensor {EMBEDDING!r}")
        return keys.size("vocab_size", 1)
    rows = embedding.shape[0]
    if keys.size("vocab_size", rows) != rows:
        keys.refuse("vocab_size", "contradicts the token embedding", expected=f"{rows:,} rows")
    return rows


def epsilon_of(keys: GgufKeys, name: str, usual: object = None) -> float:
    """Return what norms add, by the key `name`; only `usual` if the family fixes it."""
    epsilon = keys.number(name, None)
    if epsilon is None:
        keys.refuse(name, "the file does not state the epsilon of the norms", expected="a number")
    elif usual not in (None, epsilon):
        keys.refuse(name, "transformers has another in this family", expected=f"{usual}")
    return epsilon or 0.0


def special_tokens(header: GgufHeader, vocab: int, problems: Problems) -> dict[str, int | None]:
    """Return the ids of special tokens; those that are none go to `problems`."""
    ids: dict[str, int | None] = {}
    for name, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        try:
            ids[f"{name}_token_id"] = token_id(header.metadata, word, vocab)
        except InputError as error:
            problem = error.problems[0]
            where = f"{header.path}, metadata key {problem.where!r}"
            problems.extend([replace(problem, where=where)])
    return ids


def torch_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the type in which most elements are read; quantised ones are read as float32."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        size = tensor.nbytes // tensor.storage.block_bytes * tensor.storage.block
        elements[str(tensor.storage.dtype.torch)] += size
    return max(_TORCH_ORDER, key=lambda name: elements[name])


def refuse_the_rest(keys: GgufKeys) -> None:
    """Record keys that were not read and may change what the model computes."""
    for name, values in _NEUTRAL.items():
        if name in keys.used:
            continue
        value = keys.value(name)
        if value is not None and value not in values:
            expected = " or ".join(str(value) for value in values)
            keys.refuse(name, "moecc does not support models with this key", expected=expected)
    for name in keys.unused():
        if name not in _INERT:
            fault = "moecc does not know the effect of this key on the model"
            keys.refuse(name, fault, expected="only keys that moecc reads")


# Translate config.json to the metadata of a GGUF file.
#
# The reverse of `make_config`.


def config_keys(architecture: str, family: GgufFamily, config: Json) -> list[Key]:
    """Return the keys of `architecture` for a config that `misfits` does not object to."""
    heads, head_dim, facts = config["num_attention_heads"], config.get("head_dim", 0), family.facts
    groups = config["num_key_value_heads"]
    values: dict[str, Written] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config[family.config.key("intermediate_size")],
        "attention.head_count": heads,
        GROUPS: groups,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        family.epsilon_key: float(
            config.get(family.config.key("rms_norm_eps"), family.config.fixed.get("rms_norm_eps"))
        ),
        ROTATED: round(head_dim * config.get("partial_rotary_factor", 1)),
        "vocab_size": config["vocab_size"],
        **rope_keys(config),
        **_expert_keys(family, config),
        **{name: config[key] for name, key in facts.keys},
        **{name: config[key] for name, key, _ in facts.optional_keys if config[key] is not None},
        **({"rope.freq_base_swa": config["rope_local_base_freq"]} if facts.local_theta else {}),
        **dict(facts.fixed),
    }
    if family.has("latent"):
        values |= _latent_keys(config)
    if family.has("delta"):
        values |= _delta_keys(family, config)
    if family.has("conv_taps"):
        values[GROUPS] = [0 if kind == "conv" else groups for kind in config["layer_types"]]
    return [Key(f"{architecture}.{name}", value) for name, value in values.items()]


def _expert_keys(family: GgufFamily, config: Json) -> dict[str, Written]:
    mixture = family.mixture
    if mixture is None:
        return {}
    values: dict[str, Written] = {
        "expert_count": config["num_experts"],
        "expert_used_count": config[mixture.key("experts_per_token")],
    }
    if mixture.has_expert_width():
        values["expert_feed_forward_length"] = config[mixture.key("expert_intermediate_size")]
    if mixture.shared_count_key:
        count = config[mixture.shared_count_key]
        values["expert_shared_count"] = count
        values["expert_shared_feed_forward_length"] = count * config["moe_intermediate_size"]
    elif mixture.has_shared_expert:
        shared = config[mixture.key("shared_expert_intermediate_size")]
        values["expert_shared_feed_forward_length"] = shared
    return values


# What of a config llama.cpp would not compute of a GGUF file, or the format cannot state.
#
# An architecture fixes what llama.cpp computes beside the keys: full attention, SiLU, and whether
# gates are renormalised.


ACTIVATIONS = {"silu": "SiLU", "relu2": "the square of ReLU"}


def misfits(
    architecture: str, family: GgufFamily, config: Json, sparse: Sequence[bool] = ()
) -> Iterator[Problem]:
    """Yield why llama.cpp would not compute the model of `config` from such a file.

    Args:
      architecture: the name of the architecture.
      family: its row.
      config: the config.
      sparse: for each layer whether it has experts; empty for a dense model.
    """
    where, facts = f"gguf:{architecture}", family.facts
    act = config.get(family.config.key("hidden_act"), family.activation)
    if act != family.activation:
        does = ACTIVATIONS.get(str(family.activation), "GELU's tanh approximation")
        fault = f"llama.cpp computes {does} in this architecture, whatever the config says"
        yield Problem(fault, where, str(family.activation), f"the activation {act}")
    if config.get(family.config.key("mlp_bias")) and not facts.mlp_bias:
        fault = "llama.cpp reads no biases of feed-forward blocks in this architecture"
        yield Problem(fault, where, "no bias", "biases of feed-forward blocks")
    for key, value in facts.states:
        if config[key] != value:
            fault = f"llama.cpp knows no other {key} than {value} in this architecture"
            yield Problem(fault, where, f"{value}", f"{key} {config[key]}")
    if family.has("latent"):
        yield from _latent_misfits(where, config)
    if family.has("delta"):
        yield from _delta_misfits(where, config)
    if family.has("attention_chunks"):
        chunks = [IN_CHUNKS[bool(rope)] for rope in config["no_rope_layers"]]
        if config["layer_types"] != chunks:
            fault = "llama.cpp has chunks in layers with rotary positions, and in no others"
            yield Problem(fault, where, str(chunks[:4]), str(config["layer_types"][:4]))
        is_normalised = config["num_local_experts"] != UNNORMALISED
        if config["use_qk_norm"] != is_normalised:
            fault = "llama.cpp tells by the number of experts whether queries are normalised"
            yield Problem(fault, where, f"use_qk_norm {is_normalised}".lower(), "another value")
    if facts.is_tied and not config["tie_word_embeddings"]:
        fault = "llama.cpp takes the embedding as the output matrix in this architecture"
        yield Problem(fault, where, "tied embeddings", "an output matrix of its own")
    # With a period, layers without a window have no positions in both.
    if family.config.rope_of is not DecoderConfig.rope_of and not facts.window_period:
        model = family.config.from_json(config)
        layers = [n for n in range(model.num_hidden_layers) if model.rope_of(n) != model.rope]
        if layers:
            fault = "llama.cpp rotates queries and keys alike in all layers"
            yield Problem(fault, where, found=f"other positions in layers {layers[:8]}")
    step, flags = facts.no_rope_step, list(config.get("no_rope_layers") or ())
    usual = [int((layer + 1) % step != 0) for layer in range(len(flags))] if step else flags
    if flags != usual:
        fault = f"llama.cpp gives every {step}th layer no rotary positions in any case"
        yield Problem(fault, where, str(usual[:12]), str(flags[:12]))
    has_bias = family.has("output_bias") and config.get(family.config.key("output_bias"))
    if has_bias and not facts.output_bias:
        fault = "llama.cpp refuses a bias of the attention's output projection here"
        yield Problem(fault, where, "no bias", "a bias of the output projection")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads != groups and not facts.has_groups:
        fault = "llama.cpp wants as many key-value heads as query heads here"
        yield Problem(fault, where, f"{heads}", "grouped key-value heads")
    if facts.fills_width and heads * config["head_dim"] != (width := config["hidden_size"]):
        fault = "llama.cpp wants heads that together have the model's width here"
        yield Problem(fault, where, f"{width}", f"{heads} heads of {config['head_dim']}")
    yield from _score_misfits(where, facts, config)
    window = config.get("sliding_window")
    if facts.window_period or config.get("use_sliding_window") is False:
        window = None
    if isinstance(window, int) and window < config["max_position_embeddings"]:
        fault = "llama.cpp has no sliding window in this architecture"
        hint = "texts no longer than the window are the same: lower max_position_embeddings to it"
        yield Problem(fault, where, "none", f"a window of {window:,} tokens", hint)
    for cause, way_out in _rope_misfits(config, family):
        yield Problem(cause, where, found="scaled rotary positions", hint=way_out)
    if family.mixture is not None:
        yield from _expert_misfits(where, family, family.mixture, config, sparse)


def _latent_misfits(where: str, config: Json) -> Iterator[Problem]:
    """Yield where llama.cpp has other latent attention than the config."""
    eps, layers, rank = (config[k] for k in ("rms_norm_eps", "num_hidden_layers", "q_lora_rank"))
    if eps != LATENT_EPS:
        fault = (
            "llama.cpp adds rms_norm_eps in norms of latent vectors, too, and transformers 1e-06"
        )
        yield Problem(fault, where, "1e-06", f"{eps:g}", "write a folder instead")
    # So b11739 tells the published models whose queries are products of the layer's input.
    if (layers in (26, 27) or (layers == 48 and config["vocab_size"] == 128_256)) != (rank is None):
        fault = "llama.cpp tells by the number of layers whether queries have latent vectors"
        expected = "none with 26 or 27 layers, and some with others"
        shown = f"q_lora_rank {rank} with {layers} layers".lower()
        yield Problem(fault, where, expected, shown, "write a folder instead")


def _score_misfits(where: str, facts: GgufFacts, config: Json) -> Iterator[Problem]:
    """Yield where llama.cpp scales scores, or gives layers a window, otherwise than the config."""
    for name, key in facts.keys:
        if config[key] is None:
            fault = f"llama.cpp has a value of its own where {name} is not stated"
            yield Problem(fault, where, f"{key}, a number", "null")
    if period := facts.window_period:
        windows = [kind == "sliding_attention" for kind in config["layer_types"]]
        if windows != [(layer + 1) % period != 0 for layer in range(len(windows))]:
            fault = f"llama.cpp gives a window to all layers but one in {period}, the last of each"
            yield Problem(fault, where, found="other layers with a window")
    if facts.score_layers:
        is_wide = config["num_hidden_layers"] == facts.score_layers
        width = config["hidden_size"] // config["num_attention_heads"]
        usual, scalar = width if is_wide else config["head_dim"], config["query_pre_attn_scalar"]
        if scalar != usual:
            fault = "llama.cpp scales the scores of attention otherwise"
            yield Problem(fault, where, f"query_pre_attn_scalar {usual}", f"{scalar}")


def _rope_misfits(config: Json, family: GgufFamily) -> Iterator[tuple[str, str | None]]:
    """Yield why llama.cpp would rotate otherwise than a config says, and a way out."""
    scaling: Json = config["rope_scaling"] or {}
    # Both spellings of config.json are written: phi3's longrope is named by `type`.
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "yarn", "llama3", "dynamic", "longrope"):
        yield f"a GGUF file cannot state rotary positions of type {kind}", None
    if kind == "dynamic":
        yield "llama.cpp has no dynamic scaling of rotary positions", "write a folder instead"
    if kind == "longrope":
        yield "moecc does not write the factors of longrope", "write a folder instead"
    if kind in family.facts.unread_ropes:
        yield f"llama.cpp reads no positions of type {kind} in this architecture", None
    factors = [scaling.get(f"{end}_freq_factor") for end in ("low", "high")]
    if kind == "llama3" and not (family.facts.pairs_neighbours or family.facts.reads_divisors):
        yield "llama.cpp reads the divisors of Llama 3's scaling in llama files alone", None
    elif kind == "llama3" and tuple(factors) not in LLAMA3_FACTORS:
        yield (
            "only Llama 3's and 4's frequency factors, 1 and 4, or 1 twice, can be read back",
            None,
        )
    betas = tuple(scaling.get(name) or usual for name, usual in _BETAS.items())
    if kind == "yarn" and betas != tuple(_BETAS.values()):
        expected = " and ".join(f"{name} {beta}" for name, beta in _BETAS.items())
        yield f"llama.cpp computes YaRN with {expected} whatever a file says", None
    unusual = {"truncate", "attention_factor", "mscale", "mscale_all_dim"} & scaling.keys()
    if family.has("latent"):
        weights = {scaling.get(name) or 0 for name in ("mscale", "mscale_all_dim")}
        if kind == "yarn" and (len(weights) > 1 or 0 in weights):
            yield "llama.cpp wants mscale and mscale_all_dim of YaRN, and equal ones", None
        if kind not in ("default", "yarn"):
            yield f"moecc writes no positions of type {kind} with latent attention", None
        unusual -= {"mscale", "mscale_all_dim"}
    if kind == "yarn" and unusual:
        hint = "write a folder instead"
        yield f"a GGUF file cannot state {', '.join(sorted(unusual))} of YaRN", hint


def _expert_misfits(
    where: str, family: GgufFamily, mixture: type[MoeConfig], config: Json, sparse: Sequence[bool]
) -> Iterator[Problem]:
    norm, divides = config.get("norm_topk_prob", True), family.facts.renormalises
    # Shares of a softmax over all experts add up to 1.
    all_chosen = config["num_experts"] == config[mixture.key("experts_per_token")]
    all_chosen &= mixture.score == "softmax"
    if divides not in (None, norm) and not all_chosen:
        does = "divides" if divides else "does not divide"
        hint = "upcycle with gates=softmax router-init=zero" if norm else "upcycle with its default"
        if mixture.score == "sigmoid":
            hint = "upcycle with gates=sigmoid-renormalised"
        fault = f"llama.cpp {does} the chosen gates by their sum in this architecture"
        gates = "renormalised gates" if norm else "gates that are not renormalised"
        yield Problem(fault, where, found=gates, hint=hint)
    dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]
    if "interleave_moe_layer_step" in config:
        step = config["interleave_moe_layer_step"]
        dense = [] if list(sparse) == [(n + 1) % step == 0 for n in range(len(sparse))] else dense
    leading = family.leading_dense and dense == list(range(len(dense)))
    if dense and not leading:
        allowed = "after the first ones " if family.leading_dense else ""
        fault = f"llama.cpp refuses a dense layer {allowed}in a file with experts"
        shown = ", ".join(map(str, dense[:8])) + (" …" if len(dense) > 8 else "")
        gates = f"dense layers among sparse ones: {shown}"
        yield Problem(fault, where, "experts in every layer", gates)
