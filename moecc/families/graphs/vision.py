"""The graph of an encoder of images: patches, a token for all of them, and a Transformer."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.vision import Dinov2Config, VisionConfig
from moecc.ir.graph import Graph, Value
from moecc.types import F32, tensor


def build(config: VisionConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``pixels`` to ``hidden : f32[batch, seq, embed]``.

    The input is ``pixels : f32[batch, channel, height, width]``, of the size that the config says;
    the sequence is a token for the whole image, and then the patches, row by row.
    """
    encoder = _ImageEncoder(Parameters.of(config, request), config)
    graph = encoder.params.graph
    height, width = config.image_size
    sizes = {"channel": config.num_channels, "height": height, "width": width}
    pixels = graph.input("pixels", tensor(F32, batch=request.batch, **sizes))
    with encoder.builder.at("embed"):
        hidden = encoder.embed(pixels)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer)
    with encoder.builder.at("norm"):
        hidden = encoder.norm(hidden, "layernorm")
    graph.set_output("hidden", hidden)
    encoder.add_head(hidden, request.head)
    return graph


@dataclass(frozen=True)
class _ImageEncoder(Blocks):
    """The parts of the encoder."""

    config: VisionConfig

    def embed(self, pixels: Value) -> Value:
        """Emit the token of the image and the patches, with their positions added."""
        builder, config, params = self.builder, self.config, self.params
        loc, embed, side = builder.loc, config.hidden_size, config.patch_size
        name = "embeddings.patch_embeddings.projection"
        axes = {"embed": embed, "channel": config.num_channels, "down": side, "across": side}
        weight = params.plain(f"{name}.weight", loc, **axes)
        bias = params.plain(f"{name}.bias", loc, embed=embed)
        patches = builder.convolve(
            pixels,
            weight,
            over="channel",
            along=("height", "width"),
            taps=("down", "across"),
            stride=side,
            name="patches",
        )
        patches = builder.add(patches, bias, name="patches")
        patches = builder.merge(patches, axes=("height", "width"), into="seq", name="patches")
        count = config.patches + 1
        image = params.without_axis(self.names.embedding, loc, "one", seq=1, embed=embed)
        axes = {"seq": count, "embed": embed}
        table = params.without_axis("embeddings.position_embeddings", loc, "one", **axes)
        of_image, of_patches = (
            builder.slice(table, axis="seq", start=start, stop=stop)
            for start, stop in ((0, 1), (1, count))
        )
        patches = builder.add(patches, of_patches, name="patches")
        first = builder.slice(patches, axis="seq", start=0, stop=1)
        token = builder.broadcast(builder.add(image, of_image, name="image"), first)
        return builder.join(token, patches, axis="seq", name="hidden")

    def layer(self, hidden: Value, layer: int) -> Value:
        """Emit one layer: attention and feed-forward block, each added to what it reads."""
        config, output = self.config, self.names.output
        prefix = self.names.layer.format(layer=layer)
        first, second = (f"{prefix}{name}" for name in self.names.norms)
        with self.builder.at(f"layers.{layer}.attention"):
            x, name = self.norm(hidden, first), f"{prefix}attention.attention"
            names = (*(f"{name}.{n}" for n in ("query", "key", "value")), prefix + output)
            heads = (config.num_attention_heads, config.head_dim)
            unbiased = "" if config.qkv_bias else "qkv"
            block = self.attention(x, self.as_keys(x), names, heads, unbiased=unbiased)
            hidden = self._added(hidden, block, prefix, 0)
        with self.builder.at(f"layers.{layer}.ffn"):
            x = self.norm(hidden, second)
            is_gated = isinstance(config, Dinov2Config) and config.gated
            block = self._gated(x, prefix) if is_gated else self.feed_forward(x, prefix)
            return self._added(hidden, block, prefix, 1)

    def _added(self, hidden: Value, block: Value, prefix: str, number: int) -> Value:
        if self.names.scales:
            name = f"{prefix}{self.names.scales[number]}"
            scale = self.params.plain(name, self.builder.loc, embed=self.config.hidden_size)
            block = self.builder.mul(block, scale)
        return self.builder.add(hidden, block, name="hidden")

    def _gated(self, x: Value, prefix: str) -> Value:
        builder, embed = self.builder, self.config.hidden_size
        gate, up = (self._half(x, f"{prefix}{self.names.gate_up}", n) for n in range(2))
        hidden = builder.mul(builder.silu(gate), up)
        down = f"{prefix}{self.names.gated_out}"
        return self.linear(hidden, down, ("embed", embed), "mlp")

    def _half(self, x: Value, name: str, half: int) -> Value:
        """Emit gate or up, from its half of the fused projection."""
        params, loc, width = self.params, self.builder.loc, self.config.intermediate_size
        word, at, fused = ("gate", "up")[half], half * width, ("mlp", 2 * width)
        axes = {"mlp": width, "embed": self.config.hidden_size}
        weight = params.part(f"{name}.{word}.weight", f"{name}.weight", loc, at, fused, axes)
        shift = {"mlp": width}
        bias = params.part(f"{name}.{word}.bias", f"{name}.bias", loc, at, fused, shift)
        return self.builder.add(self.builder.contract(x, weight, over="embed"), bias)
