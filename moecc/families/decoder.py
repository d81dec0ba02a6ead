"""The graph of a decoder-only model, dense or sparse, of any family."""

from __future__ import annotations

from moecc.families.attention import Tables, attention
from moecc.families.configs import DecoderConfig
from moecc.families.feedforward import feed_forward
from moecc.families.names import names_of
from moecc.families.parameters import DtypeOf, Parameters, float32_of
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types.dtypes import I32
from moecc.types.tensor import Size, tensor


def build_decoder(
    config: DecoderConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    layout: str = "experts",
    batch: Size = "B",
    seq: Size = "S",
) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``.

    Args:
      config: the config.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights, for the graph's attributes.
      layout: ``experts`` (one tensor an expert) or ``fused`` (as transformers 5 stores them).
      batch: the size of the batch axis.
      seq: the size of the sequence axis.
    """
    attrs = {"family": config.model_type, "config": config.to_json(), "checkpoint": checkpoint}
    graph = Graph(config.model_type, attrs)
    params = Parameters(graph, names_of(config.model_type), dtype_of or float32_of, layout)
    builder = Builder(graph)
    tokens = graph.input("tokens", tensor(I32, batch=batch, seq=seq))
    with builder.at("embed"):
        hidden = builder.embedding(_embedding(config, params), tokens, axis="vocab", name="hidden")
        tables = Tables.of(builder, config, tokens)
    for layer in range(config.num_hidden_layers):
        hidden = _layer(builder, hidden, layer, config, params, tables)
    with builder.at("norm"):
        hidden = _norm(builder, hidden, params.names.final_norm, config, params)
    with builder.at("head"):
        head = _head(config, params)
        graph.set_output("logits", builder.contract(hidden, head, over="embed", name="logits"))
    return graph


def _layer(
    builder: Builder,
    hidden: Value,
    layer: int,
    config: DecoderConfig,
    params: Parameters,
    tables: Tables,
) -> Value:
    prefix = params.names.layer.format(layer=layer)
    with builder.at(f"layers.{layer}.attention"):
        x = _norm(builder, hidden, f"{prefix}input_layernorm.weight", config, params)
        hidden = builder.add(
            hidden, attention(builder, x, layer, config, params, tables), name="hidden"
        )
    with builder.at(f"layers.{layer}.ffn"):
        x = _norm(builder, hidden, f"{prefix}post_attention_layernorm.weight", config, params)
        return builder.add(hidden, feed_forward(builder, x, layer, config, params), name="hidden")


def _norm(
    builder: Builder, x: Value, name: str, config: DecoderConfig, params: Parameters
) -> Value:
    scale = params.plain(name, builder.loc, embed=config.hidden_size)
    return builder.rms_norm(x, scale, axis="embed", eps=config.rms_norm_eps, name="norm")


def _embedding(config: DecoderConfig, params: Parameters) -> Value:
    axes = {"vocab": config.vocab_size, "embed": config.hidden_size}
    return params.plain(params.names.embedding, "embed", **axes)


def _head(config: DecoderConfig, params: Parameters) -> Value:
    if config.tie_word_embeddings:
        return _embedding(config, params)
    axes = {"vocab": config.vocab_size, "embed": config.hidden_size}
    return params.plain(params.names.head, "head", **axes)
