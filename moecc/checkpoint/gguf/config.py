"""Translate the metadata of a GGUF file to config.json.

Every key of the architecture must be understood: an unknown key may change what the model
computes, and is rejected rather than dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moecc.checkpoint.gguf.families import GgufExperts, GgufFamily
from moecc.checkpoint.gguf.header import GgufHeader, StoredTensor
from moecc.checkpoint.gguf.keys import Keys, token_id
from moecc.checkpoint.gguf.names import EMBEDDING, HEAD
from moecc.checkpoint.gguf.rope import read_rope
from moecc.checkpoint.problems import Problems
from moecc.errors import InputError
from moecc.types.arrays import Array

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
