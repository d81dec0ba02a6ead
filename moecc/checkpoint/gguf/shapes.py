"""Architectures of GGUF whose models are no decoders of Llama's line: gpt2, gptneox, bert.

They are read and not written.  Names and orders are those of llama.cpp's converter, which
transposes the matrices of GPT-2 and puts queries, keys and values of GPT-NeoX one after another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moecc.checkpoint.gguf.config import refuse_the_rest, special_tokens, torch_dtype
from moecc.checkpoint.gguf.header import GgufHeader
from moecc.checkpoint.gguf.keys import Keys
from moecc.checkpoint.gguf.names import EMBEDDING
from moecc.checkpoint.gguf.rope import read_rope
from moecc.checkpoint.problems import Problems, quoted
from moecc.errors import nearest
from moecc.support.text import with_article
from moecc.types.arrays import Array

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
        **_further(header, shape, keys, sizes, problems),
        **special_tokens(header, vocab, problems),
        "torch_dtype": torch_dtype(header.tensors),
    }
    if keys.size("attention.head_count_kv", heads) != heads:
        keys.refuse("attention.head_count_kv", "not supported here", expected=f"{heads}")
    refuse_the_rest(keys)
    return config, heads


def _further(
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
