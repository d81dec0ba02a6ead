"""The graph of a gemma3n_text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import NormalDist

from moecc.families.gemma4 import Gemma3nTextConfig
from moecc.families.graphs.decoder import Activation, activated
from moecc.families.graphs.gemma4 import LayerInputsBlocks, LayerTables
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.ir.graph import Graph, Value

LEAST_SQUARE = 1e-5
"""The least mean square that a stream is divided by the root of."""


def build(config: Gemma3nTextConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``."""
    model = _Gemma3n(Parameters.of(config, request), config)
    graph, builder = model.params.graph, model.builder
    tokens = request.tokens(graph)
    with builder.at("embed"):
        hidden = model.embed(tokens)
        inputs = model.inputs(model.ids(tokens), hidden)
        assert inputs is not None, "the layers read embeddings of their own"
        tables = model.tables(tokens)
        others = (f"model.altup_projections.{n}" for n in range(config.streams - 1))
        streams = model.stacked(hidden, [(hidden, name) for name in others])
    for layer in range(config.num_hidden_layers):
        streams = model.layer(streams, layer, inputs, tables)
    with builder.at("norm"):
        first, *further = (model.stream(streams, n) for n in range(config.streams))
        names = (f"model.altup_unembed_projections.{n}" for n in range(config.streams - 1))
        hidden = builder.mean(
            model.stacked(first, list(zip(further, names, strict=True))), axes="stream"
        )
    model.finish(hidden)
    return graph


@dataclass(frozen=True)
class _Gemma3n(LayerInputsBlocks):
    """The parts of a gemma3n_text; streams are ``[batch, seq, stream, embed]``."""

    config: Gemma3nTextConfig

    def ids(self, tokens: Value) -> Value:
        """Emit the rows of the embeddings of layers, the first one for tokens without a row."""
        builder, count = self.builder, self.config.input_vocab
        if count >= self.config.vocab_size:
            return tokens
        bound, first = (builder.constant(value=float(n), dtype="i32") for n in (count, 0))
        return builder.select(builder.less(tokens, bound), tokens, first)

    def stream(self, streams: Value, number: int) -> Value:
        """Emit one of the streams, ``[batch, seq, embed]``."""
        part = self.builder.slice(streams, axis="stream", start=number, stop=number + 1)
        return self.builder.sum(part, axes="stream")

    def stacked(self, first: Value, others: list[tuple[Value, str]]) -> Value:
        """Emit a stream, and beside it projections of values by matrices, as large as the first."""
        builder, streams = self.builder, [first]
        square = builder.mean(builder.square(first), axes="embed")
        target = builder.pointwise(square, function="sqrt(a)")
        least = builder.constant(value=LEAST_SQUARE)
        for value, name in others:
            y = builder.rename(
                self.matrix(value, name, "out", self.config.hidden_size), axis="out", to="embed"
            )
            square = builder.maximum(builder.mean(builder.square(y), axes="embed"), least)
            streams.append(builder.mul(builder.mul(y, target), builder.rsqrt(square)))
        return builder.stack(*streams, axis="stream")

    def modalities(self, x: Value, prefix: str) -> Value:
        """Emit what weighs the streams, given one of them, ``[batch, seq, modality]``."""
        x = self.builder.scale(self.rms(x, f"{prefix}router_norm"), by=1 / self.config.hidden_size)
        count = self.config.streams
        return self.builder.tanh(self.matrix(x, f"{prefix}modality_router", "modality", count))

    def predicted(self, streams: Value, prefix: str) -> Value:
        """Emit the streams plus a mixture of them, as AltUp predicts (Baykal et al. 2023)."""
        builder, count = self.builder, self.config.streams
        weights = self.modalities(self.stream(streams, self.config.active_stream), prefix)
        name, axis = f"{prefix}prediction_coefs", "coefficient"
        weights = self.matrix(weights, name, axis, count * count, over="modality")
        weights = builder.split(weights, axis=axis, into=(("to", count), ("stream", count)))
        mixed = builder.contract(weights, streams, over="stream")
        return builder.add(streams, builder.rename(mixed, axis="to", to="stream"))

    def corrected(self, predictions: Value, x: Value, prefix: str) -> Value:
        """Emit predictions plus shares of what the active one was off, given that stream `x`."""
        builder, count = self.builder, self.config.streams
        weights = self.modalities(x, prefix)
        weights = self.matrix(weights, f"{prefix}correction_coefs", "stream", count, "modality")
        weights = builder.add(weights, builder.constant(value=1.0, name="one"))
        off = builder.sub(x, self.stream(predictions, self.config.active_stream))
        shares = builder.mul(builder.broadcast(off, predictions), weights)
        return builder.add(predictions, shares)

    def layer(self, streams: Value, layer: int, inputs: Value, tables: LayerTables) -> Value:
        """Emit one layer: the active stream goes through it, and corrects the others."""
        builder, config, prefix = self.builder, self.config, self.prefix(layer)
        streams_prefix, embed = f"{prefix}altup.", config.hidden_size
        with builder.at(f"layers.{layer}.streams"):
            predictions = self.predicted(streams, streams_prefix)
            active = self.stream(predictions, config.active_stream)
        with builder.at(f"layers.{layer}.attention"):
            x = self.rms(active, f"{prefix}input_layernorm")
            block = self.own_attention(x, layer, tables)
            block = self.rms(block, f"{prefix}post_attention_layernorm")
            hidden = builder.add(active, block)
            rank = self.matrix(x, f"{prefix}laurel.linear_left", "rank", config.laurel_rank)
            low = self.matrix(rank, f"{prefix}laurel.linear_right", "embed", embed, over="rank")
            low = builder.add(x, self.rms(low, f"{prefix}laurel.post_laurel_norm"))
            hidden = builder.scale(builder.add(hidden, low), by=sqrt(0.5), name="hidden")
        with builder.at(f"layers.{layer}.ffn"):
            x = self.rms(hidden, f"{prefix}pre_feedforward_layernorm")
            block = self.dense(x, layer, self.activation(layer))
            block = self.rms(block, f"{prefix}post_feedforward_layernorm")
            hidden = builder.add(hidden, block, name="hidden")
        with builder.at(f"layers.{layer}.inputs"):
            streams = self.corrected(predictions, hidden, streams_prefix)
            x = self.stream(streams, config.active_stream)
            name = f"{streams_prefix}correct_output_scale"
            x = builder.mul(x, self.params.plain(name, builder.loc, embed=embed))
            if config.streams == 1:
                return streams
            first = builder.slice(streams, axis="stream", start=0, stop=1)
            others = builder.slice(streams, axis="stream", start=1, stop=config.streams)
            others = builder.add(others, self.gated_input(x, layer, inputs))
            return builder.join(first, others, axis="stream", name="streams")

    def activation(self, layer: int) -> str | Activation:
        """Return the activation of a layer's neurons, which may first cut most of them off."""
        share, act = self.config.sparsities[layer], self.config.hidden_act
        return partial(self._cut_off, act, NormalDist().inv_cdf(share)) if share else act

    def _cut_off(self, act: str, deviations: float, x: Value) -> Value:
        """Emit the activation of what of `x` exceeds its mean by some standard deviations."""
        builder = self.builder
        mean = builder.mean(x, axes="mlp")
        off = builder.sub(x, mean)
        spread = builder.pointwise(
            builder.mean(builder.square(off), axes="mlp"), function="sqrt(a)"
        )
        over = builder.sub(x, builder.add(mean, builder.scale(spread, by=deviations)))
        return activated(builder, builder.relu(over), act)
