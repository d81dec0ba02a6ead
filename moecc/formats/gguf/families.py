"""The architectures of GGUF that moecc reads and writes, as rows of facts.

A row says which family of Hugging Face an architecture stands for, how tensors and keys correspond,
and what llama.cpp computes whatever a file says; `tests/engines/` holds the rows to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""The factors of low and high frequencies in Llama 3's scaling, which GGUF does not state."""

_ATTENTION: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_DENSE: Mapping[str, str] = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED: Mapping[str, str] = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS: Mapping[str, str] = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_NORMS = (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
_FOUR_NORMS = (
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_ATTENTION_BIAS = ("attention_bias", "attn_q.bias")
_MLP_BIAS = ("mlp_bias", "ffn_down.bias")
_MULTIPLIERS = (
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("attention.scale", "attention_multiplier"),
    ("logit_scale", "logits_scaling"),
)


COUNT = ("num_experts", "num_local_experts")
"""The keys of config.json with the number of experts, in most families."""


@dataclass(frozen=True, slots=True)
class GgufExperts:
    """The experts of an architecture of GGUF, which are one tensor a matrix and layer.

    Attributes:
      prefix: of their tensors in Hugging Face, after that of the layer.
      router, gate, up, down: the names after it; the matrices are below ``experts.``.
      shared: the prefix of a shared expert, after `prefix`; empty if there is none.
      shared_gate: the name of its gate, ``[1, embed]``, after `prefix`; empty if there is none.
      routing_bias: the name of the bias in the choice of experts, after `prefix`; empty if none.
      routing_bias_rows: whether that has a first axis of size 1 in Hugging Face.
      renormalises: whether llama.cpp divides the chosen gates by their sum; None: a key says it.
      norm_key: whether config.json says that; else the family always does it.
      width_key: whether the experts' width has a key of its own.
      leading_dense: whether the first layers may be dense.
      count: the keys of config.json with the number of experts.
      chosen: the key of config.json with the number of choices.
      shared_count: the key of config.json that counts shared experts of the experts' width.
    """

    prefix: str = "mlp."
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = ""
    shared_gate: str = ""
    routing_bias: str = ""
    routing_bias_rows: bool = False
    renormalises: bool | None = True
    norm_key: bool = True
    width_key: bool = True
    leading_dense: bool = False
    count: tuple[str, ...] = COUNT
    chosen: str = "num_experts_per_tok"
    shared_count: str = ""

    def stems(self) -> dict[str, str]:
        """Return the names in GGUF with those in Hugging Face, without layer and ``.weight``."""
        stems = {"ffn_gate_inp": self.prefix + self.router}
        for word in ("gate", "up", "down"):
            stems[f"ffn_{word}_exps"] = f"{self.prefix}experts.{getattr(self, word)}"
            if self.shared:
                stems[f"ffn_{word}_shexp"] = f"{self.prefix}{self.shared}{word}_proj"
        if self.shared_gate:
            stems["ffn_gate_inp_shexp"] = self.prefix + self.shared_gate
        return stems

    def rows(self) -> tuple[str, ...]:
        """Return the ends of names whose tensor has a first axis of size 1 in Hugging Face."""
        gate = f".{self.prefix}{self.shared_gate}.weight" if self.shared_gate else ""
        bias = f".{self.prefix}{self.routing_bias}" if self.routing_bias_rows else ""
        return tuple(name for name in (gate, bias) if name)


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """An architecture of GGUF, dense or with experts.

    Attributes:
      model_type: its name in config.json.
      architecture: the model class in config.json.
      pairs_neighbours: whether the rows of queries and keys are stored so that the rotary
        embedding rotates neighbours, where Hugging Face rotates halves of a head.
      head_norms: whether queries and keys are normalised per head.
      output_bias: whether llama.cpp reads a bias of the attention's output projection, or the
        family has none.
      is_fused: whether queries, keys and values are one matrix, and gate and up another.
      norms: the norms of a layer, with the names in Hugging Face.
      norms_plus_one: whether norms are stored as what they multiply by, which is 1 more than what
        Hugging Face stores.
      activation: what llama.cpp computes in a feed-forward block.
      act_key: the key of config.json with the activation.
      window_period: where layers have the window that a key states: all but every so many; 0 where
        none has.
      score_layers: where scores are divided by √`query_pre_attn_scalar`, which no key states: that
        is the width of a head, but in a model of so many layers the share of a head in the width.
      is_tied: whether the output matrix always is the embedding.
      no_rope_step: which layers have no rotary positions: every so many; 0 if none.
      flags: keys of config.json that are true where a layer has a tensor, and that tensor.
      partial_rotary: whether only a part of each head may be rotated.
      keys: further keys of the architecture, with those of config.json that say the same.
      optional_keys: of these, those that a file need not state.
      local_theta: the base period of the rotary embedding in layers with a window, if no key states
        one; 0 where it is that of all layers.
      fixed: keys of the architecture with the one value that they have.
      has_groups: whether there may be fewer key-value heads than query heads.
      needs_head: whether llama.cpp wants an output matrix even where it is the embedding.
      experts: the experts, if there are any.
    """

    model_type: str
    architecture: str
    pairs_neighbours: bool = False
    head_norms: bool = False
    output_bias: bool = False
    norms: tuple[tuple[str, str], ...] = _NORMS
    is_fused: bool = False
    norms_plus_one: bool = False
    activation: str = "silu"
    act_key: str = "hidden_act"
    window_period: int = 0
    score_layers: int = 0
    is_tied: bool = False
    no_rope_step: int = 0
    flags: tuple[tuple[str, str], ...] = (_ATTENTION_BIAS,)
    partial_rotary: bool = False
    keys: tuple[tuple[str, str], ...] = ()
    optional_keys: tuple[tuple[str, str], ...] = ()
    local_theta: float = 0.0
    fixed: tuple[tuple[str, int | float], ...] = ()
    has_groups: bool = True
    needs_head: bool = False
    experts: GgufExperts | None = None

    def stems(self) -> dict[str, str]:
        """Return the names of a layer's matrices and gains in GGUF with those in Hugging Face."""
        experts = self.experts.stems() if self.experts else {}
        heads = _HEAD_NORMS if self.head_norms else {}
        dense = {} if self.experts and not self.experts.leading_dense else _DENSE
        matrices = _FUSED if self.is_fused else {**_ATTENTION, **dense}
        return {**matrices, **dict(self.norms), **heads, **experts}

    def tensors(self) -> dict[str, str]:
        """Return the names of a layer's tensors in GGUF with those in Hugging Face."""
        stems = self.stems()
        biased = (stem for stem in stems if stem in _ATTENTION or stem in _DENSE)
        found = {
            **{f"{old}.weight": f"{new}.weight" for old, new in stems.items()},
            **{f"{old}.bias": f"{stems[old]}.bias" for old in biased},
        }
        if self.experts and self.experts.routing_bias:
            found["exp_probs_b.bias"] = self.experts.prefix + self.experts.routing_bias
        return found


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(
        "llama",
        "LlamaForCausalLM",
        pairs_neighbours=True,
        output_bias=True,
        flags=(_ATTENTION_BIAS, _MLP_BIAS),
    ),
    "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM", flags=()),
    "qwen3": GgufFamily("qwen3", "Qwen3ForCausalLM", head_norms=True),
    "granite": GgufFamily(
        "granite",
        "GraniteForCausalLM",
        pairs_neighbours=True,
        output_bias=True,
        keys=_MULTIPLIERS,
        flags=(_ATTENTION_BIAS, _MLP_BIAS),
    ),
    "smollm3": GgufFamily("smollm3", "SmolLM3ForCausalLM", pairs_neighbours=True, no_rope_step=4),
    "olmo2": GgufFamily(
        "olmo2",
        "Olmo2ForCausalLM",
        head_norms=True,
        needs_head=True,
        norms=(
            ("post_attention_norm", "post_attention_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ),
    ),
    "phi3": GgufFamily(
        "phi3",
        "Phi3ForCausalLM",
        is_fused=True,
        partial_rotary=True,
        optional_keys=(("attention.sliding_window", "sliding_window"),),
        flags=(),
    ),
    "gemma": GgufFamily(
        "gemma",
        "GemmaForCausalLM",
        norms_plus_one=True,
        activation="gelu_pytorch_tanh",
        is_tied=True,
    ),
    "gemma2": GgufFamily(
        "gemma2",
        "Gemma2ForCausalLM",
        norms=_FOUR_NORMS,
        norms_plus_one=True,
        activation="gelu_pytorch_tanh",
        act_key="hidden_activation",
        window_period=2,
        score_layers=46,
        keys=(
            ("attention.sliding_window", "sliding_window"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        is_tied=True,
    ),
    "gemma3": GgufFamily(
        "gemma3_text",
        "Gemma3ForCausalLM",
        head_norms=True,
        norms=_FOUR_NORMS,
        norms_plus_one=True,
        activation="gelu_pytorch_tanh",
        act_key="hidden_activation",
        window_period=6,
        score_layers=62,
        keys=(("attention.sliding_window", "sliding_window"),),
        optional_keys=(("final_logit_softcapping", "final_logit_softcapping"),),
        local_theta=10_000.0,
        is_tied=True,
    ),
}
"""By ``general.architecture``; Mistral and SmolLM are published as ``llama``."""

GGUF_MIXTURES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(
        "mixtral",
        "MixtralForCausalLM",
        pairs_neighbours=True,
        flags=(),
        experts=GgufExperts("block_sparse_moe.", gate="w1", up="w3", down="w2", width_key=False),
    ),
    "qwen2moe": GgufFamily(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        needs_head=True,
        flags=(("qkv_bias", "attn_q.bias"),),
        experts=GgufExperts(
            shared="shared_expert.", shared_gate="shared_expert_gate", renormalises=False
        ),
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe", "Qwen3MoeForCausalLM", head_norms=True, experts=GgufExperts()
    ),
    "olmoe": GgufFamily(
        "olmoe",
        "OlmoeForCausalLM",
        head_norms=True,
        has_groups=False,
        needs_head=True,
        experts=GgufExperts(renormalises=False, width_key=False),
    ),
    "granitemoe": GgufFamily(
        "granitemoe",
        "GraniteMoeForCausalLM",
        pairs_neighbours=True,
        output_bias=True,
        keys=_MULTIPLIERS,
        experts=GgufExperts("block_sparse_moe.", "router.layer", norm_key=False, width_key=False),
    ),
    "glm4moe": GgufFamily(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        head_norms=True,
        output_bias=True,
        norms=(_NORMS[0], ("post_attention_norm", "post_attention_layernorm")),
        flags=(_ATTENTION_BIAS, ("use_qk_norm", "attn_q_norm.weight")),
        partial_rotary=True,
        keys=(
            ("leading_dense_block_count", "first_k_dense_replace"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("expert_weights_norm", "norm_topk_prob"),
        ),
        # Scores are sigmoids.
        fixed=(("expert_gating_func", 2),),
        experts=GgufExperts(
            shared="shared_experts.",
            routing_bias="gate.e_score_correction_bias",
            renormalises=None,
            leading_dense=True,
            count=("n_routed_experts",),
            shared_count="n_shared_experts",
        ),
    ),
    "ernie4_5-moe": GgufFamily(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        flags=(),
        keys=(
            ("leading_dense_block_count", "moe_layer_start_index"),
            ("interleave_moe_layer_step", "moe_layer_interval"),
        ),
        experts=GgufExperts(
            shared="shared_experts.",
            routing_bias="moe_statics.e_score_correction_bias",
            routing_bias_rows=True,
            norm_key=False,
            leading_dense=True,
            count=("moe_num_experts",),
            chosen="moe_k",
            shared_count="moe_num_shared_experts",
        ),
    ),
}
"""Those with experts, by ``general.architecture``; Mixtral shares its name with Llama."""


# The names of a decoder's tensors in GGUF and in Hugging Face, dense or sparse.

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_GLOBAL: Mapping[str, str] = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", re.ASCII)
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)", re.ASCII)
# Merged experts, their routers, and the per-expert names of the first Mixtral files.
_EXPERT = re.compile(r"blk\.\d+\.(ffn_\w+_(exps|shexp|chexps)|ffn_gate_inp\w*|ffn_\w+\.\d+)\.")


def hugging_face_name(name: str, family: GgufFamily) -> str | None:
    """Translate a tensor name, or return None if the family has no such tensor."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer, stem, part = match.groups()
    new = family.tensors().get(f"{stem}.{part}")
    return new and f"model.layers.{layer}.{new}"


def gguf_name(name: str, family: GgufFamily) -> str:
    """Return the name in GGUF of a tensor of Hugging Face; experts are one tensor a matrix.

    Raises:
      KeyError: the family has no such tensor.
    """
    named = {new: old for old, new in _GLOBAL.items()}
    if name in named:
        return named[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    layer, rest = match.groups()
    return f"blk.{layer}.{ {new: old for old, new in family.tensors().items()}[rest] }"


def known_names(family: GgufFamily) -> list[str]:
    """Return the names that a file of this family may have, with layer 0 for every layer."""
    return [*_GLOBAL, ROPE_FACTORS, *(f"blk.0.{stem}.weight" for stem in family.stems())]


def turned_projection(name: str) -> str | None:
    """Return ``q`` or ``k`` if a Hugging Face name is a projection that is rotated."""
    match = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
    return match.group(1) if match else None


def is_norm(name: str) -> bool:
    """Whether a Hugging Face name is that of the vector of a norm."""
    return name.endswith("norm.weight")


def first_expert(names: Iterable[str]) -> str | None:
    """Return the name of a tensor that belongs to a mixture of experts, if any."""
    return next((name for name in names if _EXPERT.match(name)), None)
