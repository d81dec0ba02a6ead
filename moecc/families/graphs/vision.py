"""The graph of an encoder of images: patches, a token for all of them, and a Transformer."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.config import BlockNames
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.vision import Dinov2Config, VisionConfig
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import F32, tensor


def build(config: VisionConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``pixels`` to ``hidden : f32[batch, seq, embed]``.

    The input is ``pixels : f32[batch, channel, height, width]``, of the size that the config says;
    the sequence is a token for the whole image, and then the patches, row by row.
    """
    params, names = Parameters.of(config, request), config.names
    assert isinstance(names, BlockNames), "the names of a model with layer norms"
    graph = params.graph
    blocks = Blocks(Builder(graph), params, config.layer_norm_eps)
    encoder = _ImageEncoder(blocks, config, names)
    height, width = config.image_size
    sizes = {"channel": config.num_channels, "height": height, "width": width}
    pixels = graph.input("pixels", tensor(F32, batch=request.batch, **sizes))
    with blocks.builder.at("embed"):
        hidden = encoder.embed(pixels)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer)
    with blocks.builder.at("norm"):
        graph.set_output("hidden", blocks.norm(hidden, "layernorm"))
    return graph


@dataclass
class _ImageEncoder:
    """The parts of the encoder."""

    blocks: Blocks
    config: VisionConfig
    names: BlockNames

    @property
    def builder(self) -> Builder:
        return self.blocks.builder

    def embed(self, pixels: Value) -> Value:
        """Emit the token of the image and the patches, with their positions added."""
        builder, config, params = self.builder, self.config, self.blocks.params
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
        patches = builder.merge(builder.add(patches, bias), axes=("height", "width"), into="seq")
        count = config.patches + 1
        image = params.without_axis(self.names.embedding, loc, "one", seq=1, embed=embed)
        axes = {"seq": count, "embed": embed}
        table = params.without_axis("embeddings.position_embeddings", loc, "one", **axes)
        of_image, of_patches = (
            builder.slice(table, axis="seq", start=start, stop=stop)
            for start, stop in ((0, 1), (1, count))
        )
        first = builder.slice(patches, axis="seq", start=0, stop=1)
        token = builder.broadcast(builder.add(image, of_image), first)
        return builder.join(token, builder.add(patches, of_patches), axis="seq", name="hidden")

    def layer(self, hidden: Value, layer: int) -> Value:
        """Emit one layer: attention and feed-forward block, each added to what it reads."""
        prefix = self.names.layer.format(layer=layer)
        first, second = (f"{prefix}{name}" for name in self.names.norms)
        with self.builder.at(f"layers.{layer}.attention"):
            block = self._attention(self.blocks.norm(hidden, first), prefix)
            hidden = self._added(hidden, block, prefix, 0)
        with self.builder.at(f"layers.{layer}.ffn"):
            block = self._ffn(self.blocks.norm(hidden, second), prefix)
            return self._added(hidden, block, prefix, 1)

    def _added(self, hidden: Value, block: Value, prefix: str, number: int) -> Value:
        if self.names.scales:
            name = f"{prefix}{self.names.scales[number]}"
            scale = self.blocks.params.plain(name, self.builder.loc, embed=self.config.hidden_size)
            block = self.builder.mul(block, scale)
        return self.builder.add(hidden, block, name="hidden")

    def _attention(self, x: Value, prefix: str) -> Value:
        blocks, config, bias = self.blocks, self.config, self.config.qkv_bias
        heads, keys = (config.num_attention_heads, config.head_dim), blocks.as_keys(x)
        name = f"{prefix}attention.attention"
        query = blocks.heads(x, f"{name}.query", heads, "q", has_bias=bias)
        key = blocks.heads(keys, f"{name}.key", heads, "kv", has_bias=bias)
        value = blocks.heads(keys, f"{name}.value", heads, "kv", has_bias=bias)
        mixed = blocks.attend(query, key, value, config.head_dim**-0.5)
        to = ("embed", config.hidden_size)
        return blocks.linear(mixed, f"{prefix}{self.names.output}", to, "q")

    def _ffn(self, x: Value, prefix: str) -> Value:
        config, names, width = self.config, self.names, self.config.intermediate_size
        if isinstance(config, Dinov2Config) and config.gated:
            return self._gated(x, prefix)
        up, down = f"{prefix}{names.fc_in}", f"{prefix}{names.fc_out}"
        return self.blocks.two_layers(x, up, down, config.hidden_act, width)

    def _gated(self, x: Value, prefix: str) -> Value:
        builder, embed = self.builder, self.config.hidden_size
        gate, up = (self._half(x, f"{prefix}{self.names.gate_up}", n) for n in range(2))
        hidden = builder.mul(builder.silu(gate), up)
        down = f"{prefix}{self.names.gated_out}"
        return self.blocks.linear(hidden, down, ("embed", embed), "mlp")

    def _half(self, x: Value, name: str, half: int) -> Value:
        """Emit gate or up, from its half of the fused projection."""
        params, loc, width = self.blocks.params, self.builder.loc, self.config.intermediate_size
        word, at, fused = ("gate", "up")[half], half * width, ("mlp", 2 * width)
        axes = {"mlp": width, "embed": self.config.hidden_size}
        weight = params.part(f"{name}.{word}.weight", f"{name}.weight", loc, at, fused, axes)
        shift = {"mlp": width}
        bias = params.part(f"{name}.{word}.bias", f"{name}.bias", loc, at, fused, shift)
        return self.builder.add(self.builder.contract(x, weight, over="embed"), bias)
