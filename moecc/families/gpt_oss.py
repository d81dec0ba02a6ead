"""What a gpt_oss has beyond other mixtures: sinks, biases of experts, a clamped activation."""

from __future__ import annotations

from moecc.families.configs.gpt_oss import GptOssConfig
from moecc.families.parameters import Parameters
from moecc.ir.builder import Builder
from moecc.ir.graph import Value


def sunk(
    builder: Builder, weights: Value, scores: Value, sinks: Value, axes: tuple[str, str]
) -> Value:
    """Return attention weights of which each head's sink has taken its part.

    A softmax over scores and one more, the sink, is that over the scores times
    ``sigmoid(logsumexp(scores) − sink)``.

    Args:
      builder: where operations are appended.
      weights: the softmax of the scores, ``[…, kv_head, query_group, kv_seq]``.
      scores: the masked scores.
      sinks: one for each head, ``[head]``.
      axes: the names of the heads' axes and of that of the keys.
    """
    heads, keys = axes
    assert heads == "head", "the axis of the sinks on disk"
    sizes = [(name, _size(weights, name)) for name in ("kv_head", "query_group")]
    sink = builder.split(sinks, axis=heads, into=tuple(sizes))
    seen = builder.logsumexp(scores, axes=(keys,))
    return builder.mul(weights, builder.sigmoid(builder.sub(seen, sink)))


def _size(value: Value, axis: str) -> int:
    size = value.type[axis].size
    assert isinstance(size, int), "heads are counted"
    return size


def clamped_experts(
    builder: Builder, rows: Value, prefix: str, config: GptOssConfig, params: Parameters
) -> Value:
    """Emit the experts on their `rows`; `prefix` is that of the layer's tensors."""
    embed, width, count = config.hidden_size, config.intermediate_size, config.num_experts

    def linear(x: Value, name: str, over: str) -> Value:
        weight = params.turned_expert(prefix, name, builder.loc, embed, width, count)
        bias = params.turned_expert_bias(prefix, name, builder.loc, embed, width, count)
        return builder.add(builder.contract(x, weight, over=over, name=name), bias)

    limit, one = (builder.constant(value=v) for v in (config.swiglu_limit, 1.0))
    least = builder.constant(value=-config.swiglu_limit)
    gate = builder.minimum(linear(rows, "gate", "embed"), limit)
    up = builder.maximum(builder.minimum(linear(rows, "up", "embed"), limit), least)
    opened = builder.mul(gate, builder.sigmoid(builder.scale(gate, by=config.swiglu_alpha)))
    return linear(builder.mul(builder.add(up, one), opened), "down", "mlp")
