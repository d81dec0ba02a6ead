"""The names of a dense decoder's tensors in GGUF and in Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A dense architecture of GGUF.

    Attributes:
      model_type: its name in config.json.
      architecture: the model class in config.json.
      pairs_neighbours: whether the rows of queries and keys are stored so that the rotary
        embedding rotates neighbours, where Hugging Face rotates halves of a head.
      head_norms: whether queries and keys are normalised per head.
    """

    model_type: str
    architecture: str
    pairs_neighbours: bool = False
    head_norms: bool = False


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", "LlamaForCausalLM", pairs_neighbours=True),
    "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM"),
    "qwen3": GgufFamily("qwen3", "Qwen3ForCausalLM", head_norms=True),
}
"""By ``general.architecture``; Mistral and SmolLM are published as ``llama``."""

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_GLOBAL: Mapping[str, str] = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_PROJECTIONS: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
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
    table = {**_PROJECTIONS, **_NORMS, **(_HEAD_NORMS if family.head_norms else {})}
    if stem not in table or (part == "bias" and stem not in _PROJECTIONS):
        return None
    return f"model.layers.{layer}.{table[stem]}.{part}"


def known_names(family: GgufFamily) -> list[str]:
    """Return the names that a file of this family may have, with layer 0 for every layer."""
    stems = [*_NORMS, *_PROJECTIONS, *(_HEAD_NORMS if family.head_norms else ())]
    return [*_GLOBAL, ROPE_FACTORS, *(f"blk.0.{stem}.weight" for stem in stems)]


def turned_projection(name: str) -> str | None:
    """Return ``q`` or ``k`` if a Hugging Face name is a projection that is rotated."""
    match = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
    return match.group(1) if match else None


def first_expert(names: Iterable[str]) -> str | None:
    """Return the name of a tensor that belongs to a mixture of experts, if any."""
    return next((name for name in names if _EXPERT.match(name)), None)
