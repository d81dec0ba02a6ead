"""The names of a decoder's tensors in GGUF and in Hugging Face, dense or sparse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgufExperts:
    """The experts of an architecture of GGUF, which are one tensor a matrix and layer.

    Attributes:
      prefix: of their tensors in Hugging Face, after that of the layer.
      router, gate, up, down: the names after it; the matrices are below ``experts.``.
      shared: the prefix of a shared expert, after `prefix`; empty if there is none.
      shared_gate: the name of its gate, ``[1, embed]``, after `prefix`; empty if there is none.
      renormalises: whether llama.cpp divides the chosen gates by their sum.
      width_key: whether the experts' width has a key of its own.
      leading_dense: whether the first layers may be dense.
    """

    prefix: str = "mlp."
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = ""
    shared_gate: str = ""
    renormalises: bool = True
    width_key: bool = True
    leading_dense: bool = False

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


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """An architecture of GGUF, dense or with experts.

    Attributes:
      model_type: its name in config.json.
      architecture: the model class in config.json.
      pairs_neighbours: whether the rows of queries and keys are stored so that the rotary
        embedding rotates neighbours, where Hugging Face rotates halves of a head.
      head_norms: whether queries and keys are normalised per head.
      output_bias: whether llama.cpp reads a bias of the attention's output projection.
      experts: the experts, if there are any.
    """

    model_type: str
    architecture: str
    pairs_neighbours: bool = False
    head_norms: bool = False
    output_bias: bool = False
    experts: GgufExperts | None = None

    def stems(self) -> dict[str, str]:
        """Return the names of a layer's tensors in GGUF with those in Hugging Face."""
        experts = self.experts.stems() if self.experts else {}
        norms = _HEAD_NORMS if self.head_norms else {}
        dense = {} if self.experts and not self.experts.leading_dense else _DENSE
        return {**_ATTENTION, **dense, **_NORMS, **norms, **experts}


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", "LlamaForCausalLM", pairs_neighbours=True, output_bias=True),
    "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM"),
    "qwen3": GgufFamily("qwen3", "Qwen3ForCausalLM", head_norms=True),
}
"""By ``general.architecture``; Mistral and SmolLM are published as ``llama``."""

GGUF_MIXTURES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(
        "mixtral",
        "MixtralForCausalLM",
        pairs_neighbours=True,
        experts=GgufExperts("block_sparse_moe.", gate="w1", up="w3", down="w2", width_key=False),
    ),
    "qwen2moe": GgufFamily(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        experts=GgufExperts(
            shared="shared_expert.", shared_gate="shared_expert_gate", renormalises=False
        ),
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe", "Qwen3MoeForCausalLM", head_norms=True, experts=GgufExperts()
    ),
}
"""Those with experts, by ``general.architecture``; Mixtral shares its name with Llama."""

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_GLOBAL: Mapping[str, str] = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
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
_NORMS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_HEAD_NORMS: Mapping[str, str] = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", re.ASCII)
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)\.(weight|bias)", re.ASCII)
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
    table = family.stems()
    if stem not in table or (part == "bias" and not _has_bias(stem)):
        return None
    return f"model.layers.{layer}.{table[stem]}.{part}"


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
    layer, stem, part = match.groups()
    stems = {new: old for old, new in family.stems().items()}
    return f"blk.{layer}.{stems[stem]}.{part}"


def _has_bias(stem: str) -> bool:
    return stem in _ATTENTION or stem in _DENSE


def known_names(family: GgufFamily) -> list[str]:
    """Return the names that a file of this family may have, with layer 0 for every layer."""
    return [*_GLOBAL, ROPE_FACTORS, *(f"blk.0.{stem}.weight" for stem in family.stems())]


def turned_projection(name: str) -> str | None:
    """Return ``q`` or ``k`` if a Hugging Face name is a projection that is rotated."""
    match = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
    return match.group(1) if match else None


def first_expert(names: Iterable[str]) -> str | None:
    """Return the name of a tensor that belongs to a mixture of experts, if any."""
    return next((name for name in names if _EXPERT.match(name)), None)
