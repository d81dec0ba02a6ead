"""The graph of an encoder of audio: convolutions over samples, positions, and a Transformer."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import activated
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.wav2vec2 import AudioConfig
from moecc.ir.graph import Graph, Value
from moecc.types import F32, tensor

FEATURE_EPS = 1e-5
"""The epsilon of the norms between convolutions, whatever the config says."""


def build(config: AudioConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``audio : f32[batch, sample]`` to ``hidden : f32[batch, seq, embed]``.

    The samples are as many as make a whole number of frames, `AudioConfig.samples`.
    """
    encoder = _AudioEncoder(Parameters.of(config, request), config)
    graph = encoder.params.graph
    audio = graph.input("audio", tensor(F32, batch=request.batch, sample=config.samples))
    before, behind = config.names.around
    with encoder.builder.at("embed"):
        hidden = encoder.with_positions(encoder.project(encoder.frames(audio)))
        hidden = hidden if config.norms_first else encoder.norm(hidden, before)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer)
    if config.norms_first:
        with encoder.builder.at("norm"):
            hidden = encoder.norm(hidden, behind)
    graph.set_output("hidden", hidden)
    encoder.add_head(hidden, request.head)
    return graph


@dataclass(frozen=True)
class _AudioEncoder(Blocks):
    """The parts of the encoder."""

    config: AudioConfig

    def frames(self, audio: Value) -> Value:
        """Emit the convolutions over the samples, ``[batch, frame, channel]``."""
        builder, config = self.builder, self.config
        into = (("channel", 1), ("frame", config.samples))
        x = builder.split(audio, axis="sample", into=into)
        for number, width in enumerate(config.conv_dim):
            prefix, source = f"feature_extractor.conv_layers.{number}.", x.type["channel"].size
            assert isinstance(source, int), "the width of a model is known"
            axes = {"filter": width, "channel": source, "tap": config.conv_kernel[number]}
            kernel = self.params.plain(f"{prefix}conv.weight", builder.loc, **axes)
            stride = config.conv_stride[number]
            x = builder.convolve(
                x, kernel, over="channel", along="frame", taps="tap", stride=stride, name="frames"
            )
            if config.conv_bias:
                bias = self.params.plain(f"{prefix}conv.bias", builder.loc, filter=width)
                x = builder.add(x, bias)
            x = builder.rename(x, axis="filter", to="channel")
            if config.feature_norm == "layer" or number == 0:
                x = self._feature_norm(x, f"{prefix}layer_norm", width)
            x = activated(builder, x, config.feature_act)
        return x

    def _feature_norm(self, x: Value, name: str, width: int) -> Value:
        """Emit the norm of each frame, or of each channel over all frames."""
        builder, params = self.builder, self.params
        scale = params.plain(f"{name}.weight", builder.loc, channel=width)
        bias = params.plain(f"{name}.bias", builder.loc, channel=width)
        if self.config.feature_norm == "layer":
            return builder.layer_norm(x, scale, bias, axis="channel", eps=FEATURE_EPS)
        x = builder.sub(x, builder.mean(x, axes="frame"))
        variance = builder.mean(builder.square(x), axes="frame")
        least = builder.constant(value=FEATURE_EPS)
        x = builder.mul(x, builder.rsqrt(builder.add(variance, least)))
        return builder.add(builder.mul(x, scale), bias)

    def project(self, frames: Value) -> Value:
        """Emit frames in the width of the model, ``[batch, seq, embed]``."""
        builder, config, name = self.builder, self.config, "feature_projection"
        if config.projection_norm:
            width = config.conv_dim[-1]
            scale, bias = (
                self.params.plain(f"{name}.layer_norm.{word}", builder.loc, channel=width)
                for word in ("weight", "bias")
            )
            eps = config.layer_norm_eps
            frames = builder.layer_norm(frames, scale, bias, axis="channel", eps=eps)
        to = ("embed", config.hidden_size)
        hidden = self.linear(frames, f"{name}.projection", to, "channel")
        return builder.rename(hidden, axis="frame", to="seq")

    def with_positions(self, hidden: Value) -> Value:
        """Emit the sum of frames and the convolution that stands for their positions."""
        builder, config, params = self.builder, self.config, self.params
        embed, taps, groups = config.hidden_size, config.position_taps, config.position_groups
        name, loc, width = self.names.positions, builder.loc, config.hidden_size // groups
        weight = f"{name}.parametrizations.weight.original"
        # The weight is stored as directions, and a length for each tap: both are kept, since their
        # product, rounded, would not give them back.
        directions = params.plain(f"{weight}1", loc, filter=embed, source=width, tap=taps)
        lengths = params.without_axis(f"{weight}0", loc, "one", "other", tap=taps)
        total = builder.contract(directions, directions, over=("filter", "source"))
        kernel = builder.mul(directions, builder.mul(lengths, builder.rsqrt(total)), name="kernel")
        parts = []
        for at in range(0, embed, width):
            part = builder.slice(hidden, axis="embed", start=at, stop=at + width)
            part = builder.rename(part, axis="embed", to="source")
            filters = builder.slice(kernel, axis="filter", start=at, stop=at + width)
            part = builder.convolve(
                part, filters, over="source", along="seq", taps="tap", padding=taps // 2
            )
            parts.append(builder.rename(part, axis="filter", to="embed"))
        x = parts[0] if len(parts) == 1 else builder.join(*parts, axis="embed", name="positions")
        length = hidden.type["seq"].size
        assert isinstance(length, int), "the number of frames is known"
        if taps % 2 == 0:
            x = builder.slice(x, axis="seq", start=0, stop=length)
        x = builder.add(x, params.plain(f"{name}.bias", loc, embed=embed))
        return builder.add(hidden, activated(builder, x, config.feature_act), name="hidden")

    def layer(self, hidden: Value, layer: int) -> Value:
        """Emit one layer, whose norms stand before its blocks or behind their sums."""
        config, names = self.config, self.names
        prefix = names.layer.format(layer=layer)
        first, second = (f"{prefix}{name}" for name in names.norms)
        with self.builder.at(f"layers.{layer}.attention"):
            x = self.norm(hidden, first) if config.norms_first else hidden
            heads = (config.num_attention_heads, config.head_dim)
            block = self.attention(x, None, names.projections(prefix), heads)
            hidden = self.builder.add(hidden, block, name="hidden")
            hidden = hidden if config.norms_first else self.norm(hidden, first)
        with self.builder.at(f"layers.{layer}.ffn"):
            x = self.norm(hidden, second) if config.norms_first else hidden
            block = self.feed_forward(x, prefix)
            hidden = self.builder.add(hidden, block, name="hidden")
            return hidden if config.norms_first else self.norm(hidden, second)
