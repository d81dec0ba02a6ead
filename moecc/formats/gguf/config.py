"""Translate the metadata of a GGUF file to config.json.

Every key of the architecture must be understood: an unknown key may change what the model
computes, and is rejected rather than dropped.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moecc.errors import InputError, Problem, nearest
from moecc.formats.gguf.encode import Key, Written
from moecc.formats.gguf.families import (
    EMBEDDING,
    HEAD,
    LLAMA3_HIGH,
    LLAMA3_LOW,
    GgufExperts,
    GgufFamily,
)
from moecc.formats.gguf.header import GgufHeader, Keys, StoredTensor, token_id
from moecc.support.problems import Problems, quoted
from moecc.support.text import with_article
from moecc.support.untyped import Json
from moecc.types import Array, Doubles

# Translate the rotary embedding between a GGUF file and config.json.
#
# GGUF states the base period and a scaling by name, except for Llama 3's, of which only the
# resulting divisor of each frequency is stored, as the tensor ``rope_freqs.weight``.

# The length that Llama 3.1 to 3.3 were trained with comes first.
_OLD_LENGTHS = (8192, *(1 << power for power in range(4, 21) if power != 13))
_TOLERANCE = 1e-5
_YARN_DEFAULTS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
_BETAS = ("beta_fast", "beta_slow")
_TYPES = ("none", "linear", "yarn")


def read_rope(keys: Keys, context_length: int, divisors: Array | None) -> dict[str, object]:
    """Return ``rope_theta`` and ``rope_scaling``; what config.json cannot express is a problem.

    `divisors` [head_dim / 2] is the content of ``rope_freqs.weight`` if there is one.
    """
    theta = keys.number("rope.freq_base", 10_000.0)
    scaling = _stated(keys, context_length)
    if divisors is not None and not np.all(divisors == 1):
        if scaling is not None:
            keys.refuse("rope.scaling.type", "the file also has the divisors of Llama 3's scaling")
        scaling = _llama3(keys, theta, divisors)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _stated(keys: Keys, context_length: int) -> dict[str, object] | None:
    older = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", 0.0) or older
    kind = keys.text("rope.scaling.type", "linear")
    original = keys.size("rope.scaling.original_context_length", context_length)
    yarn = {name: keys.number(f"rope.scaling.yarn_{name}", None) for name in _BETAS}
    for name, neutral in _YARN_DEFAULTS.items():
        if keys.number(name, neutral) != neutral:
            keys.refuse(name, "moecc does not know this scaling", expected=f"{neutral}")
    if kind not in _TYPES:
        keys.refuse("rope.scaling.type", "not supported", expected=f"one of {', '.join(_TYPES)}")
    if kind == "yarn":
        stated = {name: beta for name, beta in yarn.items() if beta is not None}
        return {
            "rope_type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": original,
            **stated,
        }
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3(keys: Keys, theta: float, divisors: Array) -> dict[str, object] | None:
    """Find the parameters that yield these divisors.

    Only the ratios of the old length to the two wavelength factors determine them, so with the
    published factors 1 and 4 only the length is unknown, and a solution is exact.
    """
    factor = float(divisors.max())
    usable = bool(np.all(np.isfinite(divisors)) and divisors.min() >= 1 and theta > 0)
    for length in _OLD_LENGTHS if usable else ():
        expected = _llama3_divisors(theta, len(divisors), factor, length)
        if np.allclose(divisors, expected, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(factor))),
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    keys.problems.add(
        "config.json cannot express the divisors of the rotary frequencies",
        where=f"{keys.where}, tensor 'rope_freqs.weight'",
        expected="those of Llama 3, with low_freq_factor 1 and high_freq_factor 4",
        found=f"divisors from {divisors.min():g} to {divisors.max():g}",
    )
    return None


def _llama3_divisors(theta: float, count: int, factor: float, length: int) -> Doubles:
    """Return the divisors that Llama 3.1 applies to each of `count` frequencies."""
    frequencies = theta ** (-np.arange(count) / count)
    turns = length * frequencies / (2 * math.pi)
    kept = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    divisors: Doubles = 1 / ((1 - kept) / factor + kept)
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
        stated = {name: scaling[name] for name in _BETAS if scaling.get(name) is not None}
        keys |= {f"rope.scaling.yarn_{name}": float(beta) for name, beta in stated.items()}
    return keys


def rotary_divisors(config: Json) -> list[float] | None:
    """Return the content of ``rope_freqs.weight`` for a config, or None if it needs none."""
    scaling: Json = config["rope_scaling"] or {}
    if scaling.get("rope_type") != "llama3":
        return None
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    divisors = _llama3_divisors(config["rope_theta"], config["head_dim"] // 2, factor, length)
    found: list[float] = divisors.tolist()
    return found


_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
"""Keys that change what a model computes, with the values at which they have no effect."""

_INERT = ("rope.scaling.finetuned", "tensor_data_layout")
_TORCH_ORDER = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that determine the row order in a file."""

    heads: int
    groups: int
    head_dim: int
    rotated: int


def make_config(
    header: GgufHeader, family: GgufFamily, divisors: Array | None, problems: Problems
) -> tuple[dict[str, object], Sizes]:
    """Return config.json and the sizes of a head; every error goes to `problems`."""
    architecture = str(header.metadata["general.architecture"])
    keys = Keys(header.metadata, architecture, header.path, problems)
    hidden, context = keys.size("embedding_length"), keys.size("context_length")
    sizes = _head_sizes(keys, hidden, family)
    vocab = _vocabulary_size(keys, header)
    config: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
        family.act_key: family.activation,
        "max_position_embeddings": context,
        "rms_norm_eps": _epsilon(keys),
        "tie_word_embeddings": HEAD not in header.tensors,
        **read_rope(keys, context, divisors),
        **_flags(family, header.tensors),
        **(_experts(keys, family.experts, header.tensors) if family.experts else {}),
        **_further(keys, family, sizes),
        **special_tokens(header, vocab, problems),
        "torch_dtype": torch_dtype(header.tensors),
    }
    refuse_the_rest(keys)
    return config, sizes


def _experts(
    keys: Keys, experts: GgufExperts, tensors: Mapping[str, StoredTensor]
) -> dict[str, object]:
    """Return the keys of the experts: `num_experts` in either spelling, widths, gates."""
    found: dict[str, object] = dict.fromkeys(experts.count, keys.size("expert_count"))
    found[experts.chosen] = keys.size("expert_used_count")
    width = 0
    if experts.width_key:
        width = keys.size("expert_feed_forward_length")
        found["moe_intermediate_size"] = width
    if experts.renormalises is not None and experts.norm_key:
        found["norm_topk_prob"] = experts.renormalises
    if experts.shared_count:
        stored = [t for n, t in tensors.items() if n.endswith("ffn_gate_shexp.weight")]
        for name in ("expert_shared_count", "expert_shared_feed_forward_length"):
            keys.value(name)
        found[experts.shared_count] = stored[0].shape[0] // width if stored and width else 0
    elif experts.shared:
        stored = [t for n, t in tensors.items() if n.endswith("ffn_gate_shexp.weight")]
        size = keys.size("expert_shared_feed_forward_length", stored[0].shape[0] if stored else 1)
        found["shared_expert_intermediate_size"] = size
    return found


def _further(keys: Keys, family: GgufFamily, sizes: Sizes) -> dict[str, object]:
    """Return what else the architecture states."""
    found: dict[str, object] = {}
    for name, ours in family.keys:
        value = keys.value(name)
        if value is None:
            keys.refuse(name, "the file does not state this", expected="a value")
        else:
            found[ours] = value
    for name, ours in family.optional_keys:
        found[ours] = keys.value(name)
    for name, value in family.fixed:
        if keys.value(name) != value:
            what = "moecc does not know this variant of the architecture"
            keys.refuse(name, what, expected=str(value))
    if family.local_theta:
        found["rope_local_base_freq"] = keys.number("rope.freq_base_swa", family.local_theta)
    if family.score_layers:
        is_wide = keys.size("block_count") == family.score_layers
        width = keys.size("embedding_length") // sizes.heads if is_wide else sizes.head_dim
        found["query_pre_attn_scalar"] = width
    if family.no_rope_step:
        found["no_rope_layer_interval"] = family.no_rope_step
    if family.partial_rotary:
        found["partial_rotary_factor"] = sizes.rotated / sizes.head_dim
    return found


def _head_sizes(keys: Keys, hidden: int, family: GgufFamily) -> Sizes:
    heads = keys.size("attention.head_count")
    groups = keys.size("attention.head_count_kv", heads)
    head_dim = keys.size("attention.key_length", max(hidden // heads, 1))
    if hidden % heads and keys.value("attention.key_length") is None:
        keys.refuse("attention.head_count", f"does not divide the width {hidden:,}")
    rotated = keys.size("rope.dimension_count", head_dim)
    widths = {"attention.value_length": keys.size("attention.value_length", head_dim)}
    if not family.partial_rotary:
        widths["rope.dimension_count"] = rotated
    for other, size in widths.items():
        if size != head_dim:
            keys.refuse(other, "differs from the width of a head", expected=f"{head_dim}")
    return Sizes(heads, groups, head_dim, rotated)


def _vocabulary_size(keys: Keys, header: GgufHeader) -> int:
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        problem = "the file has no token embedding"
        keys.problems.add(problem, where=keys.where, expected=f"a tensor {EMBEDDING!r}")
        return keys.size("vocab_size", 1)
    rows = embedding.shape[0]
    if keys.size("vocab_size", rows) != rows:
        keys.refuse("vocab_size", "contradicts the token embedding", expected=f"{rows:,} rows")
    return rows


def _epsilon(keys: Keys) -> float:
    name = "attention.layer_norm_rms_epsilon"
    epsilon = keys.number(name, None)
    if epsilon is None:
        keys.refuse(name, "the file does not state the epsilon of the norms", expected="a number")
    return epsilon or 0.0


def _flags(family: GgufFamily, tensors: Mapping[str, StoredTensor]) -> dict[str, bool]:
    """Return what the presence of a tensor says, such as whether there are biases."""
    return {key: any(name.endswith(f".{end}") for name in tensors) for key, end in family.flags}


def special_tokens(header: GgufHeader, vocab: int, problems: Problems) -> dict[str, int | None]:
    """Return the ids of special tokens; those that are none go to `problems`."""
    ids: dict[str, int | None] = {}
    for name, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        try:
            ids[f"{name}_token_id"] = token_id(header.metadata, word, vocab)
        except InputError as error:
            problem = error.problems[0]
            where = f"{header.path}, metadata key {problem.where!r}"
            problems.add(problem.what, where=where, expected=problem.expected, found=problem.found)
    return ids


def torch_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the type in which most elements are read; quantised ones are read as float32."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        size = tensor.nbytes // tensor.storage.block_bytes * tensor.storage.block
        elements[str(tensor.storage.dtype.torch)] += size
    return max(_TORCH_ORDER, key=lambda name: elements[name])


def refuse_the_rest(keys: Keys) -> None:
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
            what = "moecc does not know the effect of this key on the model"
            keys.refuse(name, what, expected="only keys that moecc reads")


# Translate config.json to the metadata of a GGUF file.
#
# The reverse of `moecc.formats.gguf.config`.


def config_keys(architecture: str, family: GgufFamily, config: Json) -> list[Key]:
    """Return the keys of `architecture` for a config that `misfits` does not object to."""
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    values: dict[str, Written] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": round(head_dim * config.get("partial_rotary_factor", 1)),
        "vocab_size": config["vocab_size"],
        **rope_keys(config),
        **(_config_keys_experts(family.experts, config) if family.experts else {}),
        **{name: config[ours] for name, ours in family.keys},
        **{n: config[ours] for n, ours in family.optional_keys if config[ours] is not None},
        **({"rope.freq_base_swa": config["rope_local_base_freq"]} if family.local_theta else {}),
        **dict(family.fixed),
    }
    return [Key(f"{architecture}.{name}", value) for name, value in values.items()]


def _config_keys_experts(experts: GgufExperts, config: Json) -> dict[str, Written]:
    values: dict[str, Written] = {
        "expert_count": config["num_experts"],
        "expert_used_count": config[experts.chosen],
    }
    if experts.width_key:
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if experts.shared_count:
        count = config[experts.shared_count]
        values["expert_shared_count"] = count
        values["expert_shared_feed_forward_length"] = count * config["moe_intermediate_size"]
    elif experts.shared:
        values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return values


# What of a config llama.cpp would not compute of a GGUF file, or the format cannot state.
#
# An architecture fixes what llama.cpp computes beside the keys: full attention, SiLU, and whether
# gates are renormalised.


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
    place = f"gguf:{architecture}"
    if config[family.act_key] != family.activation:
        does = "SiLU" if family.activation == "silu" else "GELU's tanh approximation"
        what = f"llama.cpp computes {does} in this architecture, whatever the config says"
        yield Problem(what, place, family.activation, f"the activation {config[family.act_key]}")
    if config.get("mlp_bias") and "mlp_bias" not in dict(family.flags):
        what = "llama.cpp reads no biases of feed-forward blocks in this architecture"
        yield Problem(what, place, "no bias", "biases of feed-forward blocks")
    if family.is_tied and not config["tie_word_embeddings"]:
        what = "llama.cpp takes the embedding as the output matrix in this architecture"
        yield Problem(what, place, "tied embeddings", "an output matrix of its own")
    if problem := _no_rope_misfit(place, family, config):
        yield problem
    if config.get("attention_bias") and not family.output_bias:
        what = "llama.cpp refuses a bias of the attention's output projection here"
        yield Problem(what, place, "no bias", "a bias of the output projection")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads != groups and not family.has_groups:
        what = "llama.cpp wants as many key-value heads as query heads here"
        yield Problem(what, place, f"{heads}", "grouped key-value heads")
    yield from _score_misfits(place, family, config)
    window = None if family.window_period else _window(config)
    if window is not None and window < config["max_position_embeddings"]:
        what = "llama.cpp has no sliding window in this architecture"
        hint = "texts no longer than the window are the same: lower max_position_embeddings to it"
        yield Problem(what, place, "none", f"a window of {window:,} tokens", hint)
    scaled = "scaled rotary positions"
    for fault, way_out in _rope_misfits(config, family):
        yield Problem(fault, place, found=scaled, hint=way_out)
    if family.experts is not None:
        yield from _expert_misfits(place, family.experts, config, sparse)


def _no_rope_misfit(place: str, family: GgufFamily, config: Json) -> Problem | None:
    """Return a problem if other layers lack rotary positions than in llama.cpp."""
    step, found = family.no_rope_step, config.get("no_rope_layers")
    expected = [int((layer + 1) % step != 0) for layer in range(len(found or ()))] if step else []
    if not step or found == expected:
        return None
    what = f"llama.cpp gives every {step}th layer no rotary positions, whatever the config says"
    return Problem(what, place, str(expected[:12]), str(list(found or ())[:12]))


def _score_misfits(place: str, family: GgufFamily, config: Json) -> Iterator[Problem]:
    """Yield where llama.cpp scales scores, or gives layers a window, otherwise than the config."""
    for name, ours in family.keys:
        if config[ours] is None:
            what = f"llama.cpp has a value of its own where {name} is not stated"
            yield Problem(what, place, f"{ours}, a number", "null")
    if family.window_period:
        found = [kind == "sliding_attention" for kind in config["layer_types"]]
        expected = [(layer + 1) % family.window_period != 0 for layer in range(len(found))]
        if found != expected:
            period = family.window_period
            what = f"llama.cpp gives a window to all layers but one in {period}, the last of each"
            yield Problem(what, place, found="other layers with a window")
    if family.score_layers:
        is_wide = config["num_hidden_layers"] == family.score_layers
        width = config["hidden_size"] // config["num_attention_heads"]
        scalar = width if is_wide else config["head_dim"]
        if config["query_pre_attn_scalar"] != scalar:
            what = "llama.cpp scales the scores of attention otherwise"
            found_scalar = f"{config['query_pre_attn_scalar']}"
            yield Problem(what, place, f"query_pre_attn_scalar {scalar}", found_scalar)


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
    if kind == "llama3" and not family.pairs_neighbours:
        yield "llama.cpp reads the divisors of Llama 3's scaling in llama files alone", None
    elif kind == "llama3" and (
        scaling["low_freq_factor"] != LLAMA3_LOW or scaling["high_freq_factor"] != LLAMA3_HIGH
    ):
        yield "only Llama 3's own low and high frequency factors, 1 and 4, can be read back", None
    unusual = {"truncate", "attention_factor", "mscale", "mscale_all_dim"} & scaling.keys()
    if kind == "yarn" and unusual:
        yield f"a GGUF file cannot state {', '.join(sorted(unusual))} of YaRN", None


def _window(config: Json) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    found = config.get("sliding_window")
    return found if isinstance(found, int) else None


def _expert_misfits(
    place: str, experts: GgufExperts, config: Json, sparse: Sequence[bool]
) -> Iterator[Problem]:
    norm = config.get("norm_topk_prob", True)
    everyone = config["num_experts"] == config[experts.chosen]
    if experts.renormalises not in (None, norm) and not everyone:
        does = "divides" if experts.renormalises else "does not divide"
        hint = "upcycle with gates=softmax router-init=zero" if norm else "upcycle with its default"
        what = f"llama.cpp {does} the chosen gates by their sum in this architecture"
        found = "renormalised gates" if norm else "gates that are not renormalised"
        yield Problem(what, place, found=found, hint=hint)
    dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]
    leading = dense == list(range(len(dense)))
    if dense and not (experts.leading_dense and leading):
        allowed = "after the first ones " if experts.leading_dense else ""
        what = f"llama.cpp refuses a dense layer {allowed}in a file with experts"
        shown = ", ".join(map(str, dense[:8])) + (" …" if len(dense) > 8 else "")
        found = f"dense layers among sparse ones: {shown}"
        yield Problem(what, place, "experts in every layer", found)


# Architectures of GGUF whose models are no decoders of Llama's line: gpt2, gptneox, bert.
#
# They are read and not written.  Names and orders are those of llama.cpp's converter, which
# transposes the matrices of GPT-2 and puts queries, keys and values of GPT-NeoX one after
# another.

_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", re.ASCII)
_USUAL = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}


@dataclass(frozen=True)
class Order:
    """How a tensor of the file becomes that of Hugging Face.

    Attributes:
      heads: of queries, keys and values that are one after another; 0 of a transposed matrix.
    """

    heads: int = 0

    def shape(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of either, from those of the other."""
        return sizes if self.heads else sizes[::-1]

    def __call__(self, array: Array) -> Array:
        """Return a tensor of the file as that of Hugging Face."""
        if not self.heads:
            return np.ascontiguousarray(array.T)
        parts = array.reshape(3, self.heads, -1, *array.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(array.shape)


@dataclass(frozen=True)
class GgufShape:
    """An architecture.

    Attributes:
      model_type: its name in config.json.
      architecture: the model class in config.json.
      whole: the tensors of no layer, without ``.weight`` and ``.bias``.
      layer: the prefix of a layer in Hugging Face.
      stems: the tensors of a layer, likewise.
      sizes: the keys of sizes, with those of config.json.
      epsilon: the key of config.json with the epsilon of the norms.
      fixed: what config.json says of every such model.
      transposed: those of `stems` whose matrices are stored the other way round.
      by_head: that of `stems` that has queries, keys and values of each head together in Hugging
        Face, and one after another here.
    """

    model_type: str
    architecture: str
    whole: Mapping[str, str]
    layer: str
    stems: Mapping[str, str]
    sizes: Mapping[str, str] = field(default_factory=lambda: _USUAL)
    epsilon: str = "layer_norm_eps"
    fixed: Mapping[str, object] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    by_head: str = ""

    def name(self, stored: str) -> str | None:
        """Return the name in Hugging Face, or None if there is no such tensor."""
        stem, _, part = stored.rpartition(".")
        if stem in self.whole and part in ("weight", "bias"):
            return f"{self.whole[stem]}.{part}"
        match = _BLOCK.fullmatch(stored)
        if match is None or match[2] not in self.stems:
            return None
        return f"{self.layer.format(layer=match[1])}{self.stems[match[2]]}.{match[3]}"

    def order(self, stored: str, heads: int) -> Order | None:
        """Return how a tensor is brought into the order of Hugging Face, or None."""
        match = _BLOCK.fullmatch(stored)
        if match is None:
            return None
        if match[2] in self.transposed and match[3] == "weight":
            return Order()
        return Order(heads) if match[2] == self.by_head else None


SHAPES: Mapping[str, GgufShape] = {
    "gpt2": GgufShape(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f", "output": "lm_head",
        },
        "transformer.h.{layer}.",
        {
            "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        },
        {
            "embedding_length": "n_embd", "feed_forward_length": "n_inner",
            "block_count": "n_layer", "attention.head_count": "n_head",
            "context_length": "n_positions",
        },
        "layer_norm_epsilon",
        {"activation_function": "gelu_new", "tie_word_embeddings": True},
        frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    "gptneox": GgufShape(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        "gpt_neox.layers.{layer}.",
        {
            "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense", "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        fixed={"hidden_act": "gelu", "tie_word_embeddings": False},
        by_head="attn_qkv",
    ),
    "bert": GgufShape(
        "bert",
        "BertModel",
        {
            "token_embd": "embeddings.word_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        "encoder.layer.{layer}.",
        {
            "attn_q": "attention.self.query", "attn_k": "attention.self.key",
            "attn_v": "attention.self.value", "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm", "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
        },
        fixed={"hidden_act": "gelu"},
    ),
}  # fmt: skip
"""By ``general.architecture``; RoBERTa is published as ``bert``, whose graph its is."""


@dataclass(frozen=True)
class Read:
    """A file as a model: its config, the names of its tensors, and their orders by that name."""

    config: dict[str, object]
    names: dict[str, str]
    orders: dict[str, Order]


def read_shape(header: GgufHeader, shape: GgufShape, problems: Problems) -> Read:
    """Return the model of a file of such an architecture; every error goes to `problems`."""
    names: dict[str, str] = {}
    for stored in header.tensors:
        name = shape.name(stored)
        if name is None:
            known = [*shape.whole, *(f"blk.0.{stem}.weight" for stem in shape.stems)]
            hint = nearest(stored[:100], known)
            what = f"{with_article(shape.model_type)} has no tensor {quoted(stored)}"
            problems.add(what, where=str(header.path), hint=hint)
        else:
            names[stored] = name
    config, heads = _config(header, shape, problems)
    found = {name: shape.order(stored, heads) for stored, name in names.items()}
    orders = {name: order for name, order in found.items() if order is not None}
    return Read(config, names, orders)


def _config(
    header: GgufHeader, shape: GgufShape, problems: Problems
) -> tuple[dict[str, object], int]:
    architecture = str(header.metadata["general.architecture"])
    keys = Keys(header.metadata, architecture, header.path, problems)
    sizes = {key: keys.size(key) for key in shape.sizes}
    vocab = _rows(header, EMBEDDING)
    keys.value("vocab_size")
    heads = sizes["attention.head_count"]
    config: dict[str, object] = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "vocab_size": vocab,
        **{ours: sizes[key] for key, ours in shape.sizes.items()},
        shape.epsilon: keys.number("attention.layer_norm_epsilon", 1e-5),
        **shape.fixed,
        **_shapes_further(header, shape, keys, sizes, problems),
        **special_tokens(header, vocab, problems),
        "torch_dtype": torch_dtype(header.tensors),
    }
    if keys.size("attention.head_count_kv", heads) != heads:
        keys.refuse("attention.head_count_kv", "not supported here", expected=f"{heads}")
    refuse_the_rest(keys)
    return config, heads


def _shapes_further(
    header: GgufHeader,
    shape: GgufShape,
    keys: Keys,
    sizes: Mapping[str, int],
    problems: Problems,
) -> dict[str, object]:
    """Return what else the config of one of the architectures says."""
    if shape.model_type == "gpt_neox":
        width = sizes["embedding_length"] // sizes["attention.head_count"]
        rope = read_rope(keys, sizes["context_length"], None)
        return {
            **rope,
            "rotary_pct": keys.size("rope.dimension_count", width) / max(width, 1),
            "use_parallel_residual": keys.value("use_parallel_residual") is not False,
            "attention_bias": any(n.endswith("attn_qkv.bias") for n in header.tensors),
        }
    if shape.model_type == "bert":
        if keys.value("attention.causal") is not False:
            what = "a bert whose tokens do not see later ones is not supported"
            keys.refuse("attention.causal", what, expected="false")
        # Pooling is done to the hidden states, which are the output.
        keys.value("pooling_type")
        positions, types = (_rows(header, f"{n}.weight") for n in ("position_embd", "token_types"))
        if not types:
            problems.add("a bert without token types is not supported", where=str(header.path))
        return {"max_position_embeddings": positions, "type_vocab_size": max(types, 1)}
    return {}


def _rows(header: GgufHeader, name: str) -> int:
    stored = header.tensors.get(name)
    return stored.shape[0] if stored is not None else 0
