"""Architectures of GGUF whose models are no decoders of Llama's line: those of GPT-2's, and bert.

They are read and not written.  Names and orders are those of llama.cpp's converter, which
transposes the matrices of GPT-2 and puts queries, keys and values of GPT-NeoX one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.errors import Problems, nearest, quoted
from moecc.families.config import BlockNames, ModelConfig
from moecc.formats.gguf.config import read_rope, refuse_the_rest, special_tokens, torch_dtype
from moecc.formats.gguf.families import BLOCK, EMBEDDING
from moecc.formats.gguf.header import GgufHeader, GgufKeys
from moecc.support.lazy import np
from moecc.support.text import with_article
from moecc.support.untyped import JsonDict
from moecc.types import Array

_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
"""The keys of sizes, with the fields of a config."""


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


def _shape_names(config: type[ModelConfig]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names of a model's own tensors and of a layer's, without the last part."""
    names = config.names
    assert isinstance(names, BlockNames), "the names of a model with layer norms"
    stems = {
        "attn_output": names.output,
        "ffn_up": names.fc_in,
        "ffn_down": names.fc_out,
    }
    model = {"token_embd": names.embedding.removesuffix(".weight")}
    if config.model_type == "bert":
        tables = {"position_embd": "position_embeddings", "token_types": "token_type_embeddings"}
        model |= {stored: f"embeddings.{table}" for stored, table in tables.items()}
        model["token_embd_norm"] = "embeddings.LayerNorm"
        stems |= {"attn_q": names.query, "attn_k": names.key, "attn_v": names.value}
        norms = ("attn_output_norm", "layer_output_norm")
    else:
        model |= {"output_norm": names.final_norm, "output": names.head.removesuffix(".weight")}
        if names.around[0]:
            model["token_embd_norm"] = names.around[0]
        if names.positions:
            model["position_embd"] = names.positions.removesuffix(".weight")
        stems["attn_qkv"] = names.qkv
        norms = ("attn_norm", "ffn_norm")
    return model, stems | dict(zip(norms, names.norms, strict=True))


def read_shape(
    header: GgufHeader, config: type[ModelConfig], problems: Problems
) -> tuple[JsonDict, dict[str, str], dict[str, Order]]:
    """Return the config of a file of such an architecture, names of tensors, and their orders.

    Orders are by the new names; every error goes to `problems`.
    """
    content, heads = _shape_config(header, config, problems)
    model, stems = _shape_names(config)
    names: dict[str, str] = {}
    orders: dict[str, Order] = {}
    for stored in header.tensors:
        stem, _, part = stored.rpartition(".")
        match = BLOCK.fullmatch(stored)
        if stem in model and part in ("weight", "bias"):
            names[stored] = f"{model[stem]}.{part}"
        elif match is not None and match[2] in stems:
            prefix = config.names.layer.format(layer=match[1])
            names[stored] = name = f"{prefix}{stems[match[2]]}.{part}"
            is_matrix = not match[2].endswith("norm") and part == "weight"
            if config.names.inputs_first and is_matrix:
                orders[name] = Order()
            elif match[2] == "attn_qkv" and getattr(config.names, "by_head", False):
                orders[name] = Order(heads)
        else:
            names_of_files = [*model, *(f"blk.0.{stem}.weight" for stem in stems)]
            hint = nearest(stored[:100], names_of_files)
            fault = f"{with_article(config.model_type)} has no tensor {quoted(stored)}"
            problems.add(fault, where=header.path, hint=hint)
    return content, names, orders


def _shape_config(
    header: GgufHeader, family: type[ModelConfig], problems: Problems
) -> tuple[JsonDict, int]:
    keys = GgufKeys(header, problems)
    sizes = {key: keys.size(key) for key in _SIZES}
    vocab = _rows(header, EMBEDDING)
    keys.value("vocab_size")
    heads = sizes["attention.head_count"]
    assert family.gguf is not None, "a family with an architecture"
    config: JsonDict = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab,
        **{family.key(field): sizes[key] for key, field in _SIZES.items()},
        family.key("layer_norm_eps"): keys.number("attention.layer_norm_epsilon", 1e-5),
        **dict(family.gguf.states),
        **special_tokens(header, vocab, problems),
        "torch_dtype": torch_dtype(header.tensors),
    }
    if family.model_type == "gpt_neox":
        width = sizes["embedding_length"] // heads
        config |= {
            **read_rope(keys, sizes["context_length"], None),
            "rotary_pct": keys.size("rope.dimension_count", width) / max(width, 1),
            "use_parallel_residual": keys.value("use_parallel_residual") is not False,
            "attention_bias": any(n.endswith("attn_qkv.bias") for n in header.tensors),
        }
    if family.model_type == "mpt":
        if keys.number("attention.max_alibi_bias", 8.0) != 8:
            keys.refuse("attention.max_alibi_bias", "transformers computes with 8", expected="8")
        config["attn_config"] = {"clip_qkv": keys.number("attention.clamp_kqv", None)}
    if family.model_type == "bert":
        if keys.value("attention.causal") is not False:
            fault = "a bert whose tokens do not see later ones is not supported"
            keys.refuse("attention.causal", fault, expected="false")
        # Pooling is done to the hidden states, which are the output.
        keys.value("pooling_type")
        positions, types = (_rows(header, f"{n}.weight") for n in ("position_embd", "token_types"))
        if not types:
            problems.add("a bert without token types is not supported", where=header.path)
        config |= {"max_position_embeddings": positions, "type_vocab_size": max(types, 1)}
    if keys.size("attention.head_count_kv", heads) != heads:
        keys.refuse("attention.head_count_kv", "not supported here", expected=f"{heads}")
    refuse_the_rest(keys)
    return config, heads


def _rows(header: GgufHeader, name: str) -> int:
    stored = header.tensors.get(name)
    return stored.shape[0] if stored is not None else 0
