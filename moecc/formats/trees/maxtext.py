"""The decoders of MaxText as Hugging Face has them: names, axes, and what it does to queries.

Kernels are stored with their inputs first, layers that are scanned along axis 1, experts along
axis 0 (MaxText 0.2.5, ``checkpoint_conversion/utils/param_mapping.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

from moecc.families.config import ModelConfig
from moecc.families.names import MaxTextFacts
from moecc.families.registry import CONFIGS
from moecc.formats.trees.arrays import ArrayPiece, Tree
from moecc.support.problems import Problems, quoted
from moecc.support.text import with_article

MARKS = (("decoder", "decoder_norm", "scale"),)
"""An array that every such decoder has."""

_LAYER = re.compile(r"layers(?:_(\d{1,5}))?", re.ASCII)

_VECTORS: Mapping[tuple[str, ...], str] = {
    ("pre_self_attention_layer_norm", "scale"): "input_layernorm.weight",
    ("post_self_attention_layer_norm", "scale"): "post_attention_layernorm.weight",
    ("self_attention", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("self_attention", "key_norm", "scale"): "self_attn.k_norm.weight",
}
_HEADS = {"query": "q", "key": "k", "value": "v"}
_MATRICES = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
_BLOCKS = {"moe_block", "MoeBlock_0"}


@dataclass(frozen=True)
class _MaxTextDecoder:
    family: type[ModelConfig]
    facts: MaxTextFacts
    head_dim: int
    layers: int
    experts: int
    vocab: int
    turned: bool


def maxtext_pieces(
    tree: Tree, config: Mapping[str, object], problems: Problems
) -> dict[str, ArrayPiece]:
    """Return the tensors of the model by their Hugging Face names; what is unknown is reported."""
    decoder = _decoder(config, problems)
    pieces: dict[str, ArrayPiece] = {}
    if decoder is None:
        return pieces
    for path, key in tree.below(MARKS).items():
        # Programs on NNX keep an array below its variable.
        path = path[:-1] if path[-1] == "value" else path
        rank = len(tree.arrays.shape(key))
        tensors = dict(_pieces(path, key, rank, decoder))
        if not tensors:
            family = with_article(decoder.family.model_type)
            problems.add(
                f"moecc does not know this array of {family} of MaxText",
                where=f"{tree.folder}, array {quoted('.'.join(path))}",
                hint="export it with MaxText's to_huggingface, or write a .moe graph over the "
                "arrays: docs/adding-a-family.md",
            )
        pieces.update(tensors)
    return pieces


def _decoder(config: Mapping[str, object], problems: Problems) -> _MaxTextDecoder | None:
    families = {name: c for name, c in CONFIGS.items() if c.maxtext is not None}
    family = families.get(str(config.get("model_type")))
    if family is None or family.maxtext is None:
        problems.add(
            "moecc reads other families of MaxText than this",
            where="config.json: model_type",
            expected=" or ".join(families),
            found=str(config.get("model_type")),
            hint="export it with MaxText's to_huggingface",
        )
        return None
    heads = _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim") or _size(config, "hidden_size") // max(heads, 1)
    experts = _size(config, "num_local_experts") or _size(config, "num_experts")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
    layers, vocab = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
    turned = kind == "llama3"
    return _MaxTextDecoder(family, family.maxtext, head_dim, layers, experts, vocab, turned)


def _size(config: Mapping[str, object], key: str) -> int:
    size = config.get(key)
    return size if type(size) is int and 0 < size < 1 << 26 else 0


def _pieces(
    path: tuple[str, ...], key: str, rank: int, decoder: _MaxTextDecoder
) -> Iterator[tuple[str, ArrayPiece]]:
    match path:
        case ("token_embedder", "embedding"):
            yield (
                "model.embed_tokens.weight",
                ArrayPiece(key, (0,), (1,), limit=decoder.vocab or None),
            )
        case ("decoder", "decoder_norm", "scale"):
            yield "model.norm.weight", ArrayPiece(key, (0,))
        case ("decoder", "logits_dense", "kernel"):
            yield "lm_head.weight", ArrayPiece(key, (1,), (0,), limit=decoder.vocab or None)
        case ("decoder", stack, *inner) if named := _LAYER.fullmatch(stack):
            is_scanned = named[1] is None
            layers = range(decoder.layers) if is_scanned else (int(named[1]),)
            for name, piece in _layer(tuple(inner), key, rank - is_scanned, decoder):
                for layer in layers:
                    tensor = f"model.layers.{layer}.{name}"
                    yield tensor, piece.of_layer(layer) if is_scanned else piece


def _layer(
    path: tuple[str, ...], key: str, rank: int, decoder: _MaxTextDecoder
) -> Iterator[tuple[str, ArrayPiece]]:
    """Yield the tensors of one layer that an array without an axis of layers has."""
    facts, names = decoder.facts, decoder.family.names
    match path, rank:
        case _, 1 if path in _VECTORS:
            yield _VECTORS[path], ArrayPiece(key, (0,))
        case ("self_attention", ("query" | "key" | "value") as part, "kernel"), 3:
            halves = decoder.turned and part != "value"
            folded = facts.folds_scale and part == "query"
            scale = sqrt(decoder.head_dim) if folded else 1.0
            name = f"self_attn.{_HEADS[part]}_proj.weight"
            yield name, ArrayPiece(key, (1, 2), (0,), halves=halves, scale=scale)
        case ("self_attention", ("query" | "key" | "value") as part, "bias"), 2 if facts.biases:
            yield f"self_attn.{_HEADS[part]}_proj.bias", ArrayPiece(key, (0, 1))
        case ("self_attention", "out", "kernel"), 3:
            yield "self_attn.o_proj.weight", ArrayPiece(key, (2,), (0, 1))
        case ("mlp", matrix, "kernel"), 2 if matrix in _MATRICES:
            yield f"mlp.{_MATRICES[matrix]}_proj.weight", ArrayPiece(key, (1,), (0,))
        case (block, "gate", "kernel"), 2 if block in _BLOCKS:
            yield names.sparse + names.router, ArrayPiece(key, (1,), (0,))
        case (block, matrix), 3 if block in _BLOCKS and matrix in _MATRICES:
            word = names.matrix(_MATRICES[matrix])
            for expert in range(decoder.experts):
                prefix = names.sparse + names.expert.format(expert=expert)
                yield f"{prefix}{word}.weight", ArrayPiece(key, (2,), (1,), at={0: expert})
