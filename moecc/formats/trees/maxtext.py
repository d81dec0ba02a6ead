"""The decoders of MaxText as Hugging Face has them: names, axes, and what it does to queries.

Kernels are stored with their inputs first, layers that are scanned along axis 1, experts along
axis 0 (MaxText 0.2.5, ``checkpoint_conversion/utils/param_mapping.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

from moecc.formats.trees.arrays import Piece, Tree
from moecc.support.problems import Problems, quoted
from moecc.support.text import with_article

MARKS = (("decoder", "decoder_norm", "scale"),)
"""An array that every such decoder has."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
_FOLDED = ("llama", "mistral", "mixtral")
"""Families whose queries MaxText stores divided by the root of the width of a head."""

_LAYER = re.compile(r"layers(?:_(\d{1,5}))?", re.ASCII)

_VECTORS: Mapping[tuple[str, ...], str] = {
    ("pre_self_attention_layer_norm", "scale"): "input_layernorm.weight",
    ("post_self_attention_layer_norm", "scale"): "post_attention_layernorm.weight",
    ("self_attention", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("self_attention", "key_norm", "scale"): "self_attn.k_norm.weight",
}
_HEADS = {"query": "q", "key": "k", "value": "v"}
_MATRICES = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
_MIXTRAL = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}
_BLOCKS = {"moe_block", "MoeBlock_0"}


@dataclass(frozen=True)
class _Decoder:
    family: str
    head_dim: int
    layers: int
    experts: int
    vocab: int
    turned: bool

    @property
    def query_scale(self) -> float:
        return sqrt(self.head_dim) if self.family in _FOLDED else 1.0


def maxtext_pieces(
    tree: Tree, config: Mapping[str, object], problems: Problems
) -> dict[str, Piece]:
    """Return the tensors of the model by their Hugging Face names; what is unknown is reported."""
    decoder = _decoder(config, problems)
    pieces: dict[str, Piece] = {}
    if decoder is None:
        return pieces
    for path, key in tree.below(MARKS).items():
        # Programs on NNX keep an array below its variable.
        path = path[:-1] if path[-1] == "value" else path
        rank = len(tree.arrays.shape(key))
        found = dict(_pieces(path, key, rank, decoder))
        if not found:
            problems.add(
                f"moecc does not know this array of {with_article(decoder.family)} of MaxText",
                where=f"{tree.folder}, array {quoted('.'.join(path))}",
                hint="export it with MaxText's to_huggingface, or write a .moe graph over the "
                "arrays: docs/adding-a-family.md",
            )
        pieces.update(found)
    return pieces


def _decoder(config: Mapping[str, object], problems: Problems) -> _Decoder | None:
    family = config.get("model_type")
    if family not in FAMILIES:
        problems.add(
            "moecc reads other families of MaxText than this",
            where="config.json: model_type", expected=" or ".join(FAMILIES), found=str(family),
            hint="export it with MaxText's to_huggingface",
        )  # fmt: skip
        return None
    heads = _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim") or _size(config, "hidden_size") // max(heads, 1)
    experts = _size(config, "num_local_experts") or _size(config, "num_experts")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
    return _Decoder(
        str(family), head_dim, _size(config, "num_hidden_layers"), experts,
        _size(config, "vocab_size"), kind == "llama3",
    )  # fmt: skip


def _size(config: Mapping[str, object], key: str) -> int:
    found = config.get(key)
    return found if type(found) is int and 0 < found < 1 << 26 else 0


def _pieces(
    path: tuple[str, ...], key: str, rank: int, decoder: _Decoder
) -> Iterator[tuple[str, Piece]]:
    match path:
        case ("token_embedder", "embedding"):
            yield "model.embed_tokens.weight", Piece(key, (0,), (1,), limit=decoder.vocab or None)
        case ("decoder", "decoder_norm", "scale"):
            yield "model.norm.weight", Piece(key, (0,))
        case ("decoder", "logits_dense", "kernel"):
            yield "lm_head.weight", Piece(key, (1,), (0,), limit=decoder.vocab or None)
        case ("decoder", stack, *rest) if named := _LAYER.fullmatch(stack):
            is_scanned = named[1] is None
            layers = range(decoder.layers) if is_scanned else (int(named[1]),)
            for name, piece in _layer(tuple(rest), key, rank - is_scanned, decoder):
                for layer in layers:
                    whole = f"model.layers.{layer}.{name}"
                    yield whole, piece.of_layer(layer) if is_scanned else piece


def _layer(
    path: tuple[str, ...], key: str, rank: int, decoder: _Decoder
) -> Iterator[tuple[str, Piece]]:
    """Yield the tensors of one layer that an array without an axis of layers has."""
    is_qwen = decoder.family.startswith("qwen")
    match path, rank:
        case _, 1 if path in _VECTORS:
            yield _VECTORS[path], Piece(key, (0,))
        case ("self_attention", ("query" | "key" | "value") as part, "kernel"), 3:
            halves = decoder.turned and part != "value"
            scale = decoder.query_scale if part == "query" else 1.0
            name = f"self_attn.{_HEADS[part]}_proj.weight"
            yield name, Piece(key, (1, 2), (0,), halves=halves, scale=scale)
        case ("self_attention", ("query" | "key" | "value") as part, "bias"), 2 if is_qwen:
            yield f"self_attn.{_HEADS[part]}_proj.bias", Piece(key, (0, 1))
        case ("self_attention", "out", "kernel"), 3:
            yield "self_attn.o_proj.weight", Piece(key, (2,), (0, 1))
        case ("mlp", matrix, "kernel"), 2 if matrix in _MATRICES:
            yield f"mlp.{_MATRICES[matrix]}.weight", Piece(key, (1,), (0,))
        case (block, "gate", "kernel"), 2 if block in _BLOCKS:
            yield f"{_sparse(decoder)}.gate.weight", Piece(key, (1,), (0,))
        case (block, matrix), 3 if block in _BLOCKS and matrix in _MATRICES:
            word = (_MIXTRAL if decoder.family == "mixtral" else _MATRICES)[matrix]
            for expert in range(decoder.experts):
                name = f"{_sparse(decoder)}.experts.{expert}.{word}.weight"
                yield name, Piece(key, (2,), (1,), at={0: expert})


def _sparse(decoder: _Decoder) -> str:
    return "block_sparse_moe" if decoder.family == "mixtral" else "mlp"
