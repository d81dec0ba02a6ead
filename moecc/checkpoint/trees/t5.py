"""The dense T5 of T5X as Hugging Face has it; its config follows from the arrays.

Names are those of ``examples/t5/network.py`` of t5x.  Neither scales the scores of attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.trees.tree import Piece, Tree

MARKS = (("encoder", "encoder_norm", "scale"),)
"""An array that every T5 has."""

_LAYER = re.compile(r"layers_(\d{1,5})", re.ASCII)
_PARTS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_SELF = {"encoder": "attention", "decoder": "self_attention"}
_NORMS = {
    "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    "decoder": (
        "pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm",
    ),
}  # fmt: skip


def t5_pieces(tree: Tree, problems: Problems) -> dict[str, Piece]:
    """Return the tensors of the model by their Hugging Face names; what is unknown is reported."""
    pieces: dict[str, Piece] = {}
    for path, key in tree.below(MARKS).items():
        found = dict(_pieces(path, key))
        if not found:
            problems.add(
                "moecc does not know this array of a dense T5",
                where=f"{tree.folder}, array {quoted('.'.join(path))}",
                hint="write a .moe graph over the arrays: docs/adding-a-family.md",
            )
        pieces.update(found)
    return pieces


def _pieces(path: tuple[str, ...], key: str) -> Iterator[tuple[str, Piece]]:
    match path:
        case ("token_embedder", "embedding"):
            yield "shared.weight", Piece(key, (0,), (1,))
        case ("decoder", "logits_dense", "kernel"):
            yield "lm_head.weight", Piece(key, (1,), (0,))
        case (("encoder" | "decoder") as stack, norm, "scale") if norm == f"{stack}_norm":
            yield f"{stack}.final_layer_norm.weight", Piece(key, (0,))
        case (("encoder" | "decoder") as stack, "relpos_bias", "rel_embedding"):
            inside = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            yield f"{stack}.{inside}", Piece(key, (1,), (0,))
        case (("encoder" | "decoder") as stack, layer, *rest) if named := _LAYER.fullmatch(layer):
            for name, piece in _layer(stack, tuple(rest), key):
                yield f"{stack}.block.{int(named[1])}.layer.{name}", piece


def _layer(stack: str, path: tuple[str, ...], key: str) -> Iterator[tuple[str, Piece]]:
    """Yield the tensor of an array of a layer; its name begins with the number of the sublayer."""
    last = len(_NORMS[stack]) - 1
    matrix = Piece(key, (1,), (0,))
    match path:
        case (norm, "scale") if norm in _NORMS[stack]:
            yield f"{_NORMS[stack].index(norm)}.layer_norm.weight", Piece(key, (0,))
        case (block, part, "kernel") if block == _SELF[stack] and part in _PARTS:
            yield f"0.SelfAttention.{_PARTS[part]}.weight", matrix
        case ("encoder_decoder_attention", part, "kernel") if part in _PARTS and last == 2:
            yield f"1.EncDecAttention.{_PARTS[part]}.weight", matrix
        case ("mlp", ("wi" | "wi_0" | "wi_1" | "wo") as word, "kernel"):
            yield f"{last}.DenseReluDense.{word}.weight", matrix


def t5_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Return the config that the sizes of the tensors imply, with what T5 fixes.

    T5X keeps none.  Version 1.0 has one matrix before the ReLU and a tied embedding, 1.1 a gated
    GELU; both have 128 as the furthest distance, and 1e-6 in their norms.
    """
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    is_gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    up = f"encoder.block.0.layer.1.DenseReluDense.wi{'_0' if is_gated else ''}.weight"
    if not {"shared.weight", bias, query, up} <= shapes.keys():
        return {}
    buckets, heads = shapes[bias]
    vocab, width = shapes["shared.weight"]
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shapes[query][0] // max(heads, 1),
        "d_ff": shapes[up][0],
        "num_layers": _count(shapes, "encoder"),
        "num_decoder_layers": _count(shapes, "decoder"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _count(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    return len({n.split(".")[2] for n in shapes if n.startswith(f"{stack}.block.")})
