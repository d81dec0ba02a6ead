"""The names of a decoder's tensors in GGUF and in Hugging Face, dense or sparse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from moecc.checkpoint.gguf.families import GgufFamily

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
