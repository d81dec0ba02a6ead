"""Tensors that a family has and a model does without: written at values that change nothing.

Engines build such parts unconditionally, and take what lies in memory for a tensor that is not in
the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moecc.families.configs import (
    DecoderConfig,
    GptOssConfig,
    ModelConfig,
    MoeConfig,
    Qwen2MoeConfig,
)
from moecc.families.names import TensorNames, names_of
from moecc.types.dtypes import F32
from moecc.types.tensor import tensor
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Merge, Stack


def completed(config: ModelConfig) -> tuple[ModelConfig, dict[str, Expr]]:
    """Return the config that the family's engines read, and the tensors that it adds."""
    if not isinstance(config, MoeConfig):
        return config, {}
    names = names_of(config.model_type)
    added = dict(_routing_biases(config, names))
    if isinstance(config, GptOssConfig) and config.plain:
        return replace(config, plain=False), dict(_plain_gpt_oss(config, names))
    if isinstance(config, Qwen2MoeConfig) and not config.qkv_bias:
        # transformers could do without; vLLM and mlx-lm could not.
        return replace(config, qkv_bias=True), added | dict(_projection_biases(config, names))
    return config, added


def _routing_biases(config: MoeConfig, names: TensorNames) -> Iterator[tuple[str, Expr]]:
    if not config.has_routing_bias or config.routing_bias:
        return
    rows = {"row": 1} if names.routing_bias_rows else {}
    for layer, is_sparse in enumerate(config.sparse_layers):
        if is_sparse:
            prefix = names.layer.format(layer=layer)
            type = tensor(F32, **rows, expert=config.num_experts)
            yield f"{prefix}{names.sparse}{names.routing_bias}", Full(0.0, type)


def _projection_biases(config: DecoderConfig, names: TensorNames) -> Iterator[tuple[str, Expr]]:
    heads = {
        "q": config.num_attention_heads,
        "k": config.num_key_value_heads,
        "v": config.num_key_value_heads,
    }
    for layer in range(config.num_hidden_layers):
        prefix = names.layer.format(layer=layer)
        for letter, count in heads.items():
            type = tensor(F32, heads=count * config.head_dim)
            yield f"{prefix}self_attn.{letter}_proj.bias", Full(0.0, type)


NO_SINK = -1e4
"""A score beside which every other is infinitely larger, and that fits half precision."""


def _plain_gpt_oss(config: GptOssConfig, names: TensorNames) -> Iterator[tuple[str, Expr]]:
    """Yield sinks that take nothing and biases that add nothing; that of `up` undoes its + 1."""
    count, width = config.num_experts, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        prefix = names.layer.format(layer=layer)
        sinks = tensor(F32, head=config.num_attention_heads)
        yield f"{prefix}self_attn.sinks", Full(NO_SINK, sinks)
        at = f"{prefix}{names.sparse}"
        yield f"{at}router.bias", Full(0.0, tensor(F32, expert=count))
        half = tensor(F32, expert=count, mlp=width)
        turns = Stack((Full(0.0, half), Full(-1.0, half)), "turn", 2)
        yield f"{at}{names.expert_gate_up}_bias", Merge(turns, ("mlp", "turn"), "gate_up")
        down = tensor(F32, expert=count, embed=config.hidden_size)
        yield f"{at}{names.expert_down}_bias", Full(0.0, down)
