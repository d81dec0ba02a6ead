"""The graph of an encoder of images: patches, a token for all of them, and a Transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import DtypeOf, Parameters, float32_of
from moecc.families.names import names_of
from moecc.families.vision import Dinov2Config, VisionConfig
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import F32, Size, tensor


@dataclass(frozen=True)
class VisionNames:
    """The names of a layer's parts that differ between the families.

    Attributes:
      norms: the norms before attention and feed-forward block.
      up, down: the matrices of the feed-forward block.
      gate_up: the one matrix of gate and up, in this order, of a gated block.
      scales: the vectors that what a block adds is multiplied by; empty if there are none.
    """

    norms: tuple[str, str]
    up: str
    down: str
    gate_up: str = ""
    gated_down: str = ""
    scales: tuple[str, ...] = ()


VISION_NAMES: Mapping[str, VisionNames] = {
    "vit": VisionNames(
        ("layernorm_before", "layernorm_after"), "intermediate.dense", "output.dense"
    ),
    "dinov2": VisionNames(
        ("norm1", "norm2"),
        "mlp.fc1",
        "mlp.fc2",
        "mlp.weights_in",
        "mlp.weights_out",
        ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
}
"""By family, as checkpoints have them."""


def build_vision(
    config: VisionConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    batch: Size = "B",
) -> Graph:
    """Return the graph from ``pixels`` to ``hidden : f32[batch, seq, embed]``.

    The input is ``pixels : f32[batch, channel, height, width]``, of the size that the config says;
    the sequence is a token for the whole image, and then the patches, row by row.

    Args:
      config: the config.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights, for the graph's attributes.
      batch: the size of the batch axis.
    """
    attrs = {"family": config.model_type, "config": config.to_json(), "checkpoint": checkpoint}
    graph = Graph(config.model_type, attrs)
    params = Parameters(graph, names_of(config.model_type), dtype_of or float32_of)
    blocks = Blocks(Builder(graph), params, config.layer_norm_eps)
    encoder = _Encoder(blocks, config, VISION_NAMES[config.model_type])
    height, width = config.image_size
    sizes = {"channel": config.num_channels, "height": height, "width": width}
    pixels = graph.input("pixels", tensor(F32, batch=batch, **sizes))
    with blocks.builder.at("embed"):
        hidden = encoder.embed(pixels)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer)
    with blocks.builder.at("norm"):
        graph.set_output("hidden", blocks.norm(hidden, "layernorm"))
    return graph


@dataclass
class _Encoder:
    """The parts of the encoder."""

    blocks: Blocks
    config: VisionConfig
    names: VisionNames

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
        whole = params.without_axis("embeddings.cls_token", loc, "one", seq=1, embed=embed)
        places = {"seq": count, "embed": embed}
        table = params.without_axis("embeddings.position_embeddings", loc, "one", **places)
        own, others = (
            builder.slice(table, axis="seq", start=start, stop=stop)
            for start, stop in ((0, 1), (1, count))
        )
        first = builder.slice(patches, axis="seq", start=0, stop=1)
        token = builder.broadcast(builder.add(whole, own), first)
        return builder.join(token, builder.add(patches, others), axis="seq", name="hidden")

    def layer(self, hidden: Value, layer: int) -> Value:
        """Emit one layer: attention and feed-forward block, each added to what it reads."""
        prefix = f"encoder.layer.{layer}."
        first, second = (f"{prefix}{name}" for name in self.names.norms)
        with self.builder.at(f"layers.{layer}.attention"):
            made = self._attention(self.blocks.norm(hidden, first), prefix)
            hidden = self._added(hidden, made, prefix, 0)
        with self.builder.at(f"layers.{layer}.ffn"):
            made = self._ffn(self.blocks.norm(hidden, second), prefix)
            return self._added(hidden, made, prefix, 1)

    def _added(self, hidden: Value, made: Value, prefix: str, block: int) -> Value:
        if self.names.scales:
            name = f"{prefix}{self.names.scales[block]}"
            scale = self.blocks.params.plain(name, self.builder.loc, embed=self.config.hidden_size)
            made = self.builder.mul(made, scale)
        return self.builder.add(hidden, made, name="hidden")

    def _attention(self, x: Value, prefix: str) -> Value:
        blocks, config, bias = self.blocks, self.config, self.config.qkv_bias
        heads, keys = (config.num_attention_heads, config.head_dim), blocks.as_keys(x)
        name = f"{prefix}attention.attention"
        query = blocks.heads(x, f"{name}.query", heads, "q", has_bias=bias)
        key = blocks.heads(keys, f"{name}.key", heads, "kv", has_bias=bias)
        value = blocks.heads(keys, f"{name}.value", heads, "kv", has_bias=bias)
        mixed = blocks.attend(query, key, value, config.head_dim**-0.5)
        to = ("embed", config.hidden_size)
        return blocks.linear(mixed, f"{prefix}attention.output.dense", to, "q")

    def _ffn(self, x: Value, prefix: str) -> Value:
        config, names, width = self.config, self.names, self.config.intermediate_size
        if isinstance(config, Dinov2Config) and config.gated:
            return self._gated(x, prefix)
        up, down = f"{prefix}{names.up}", f"{prefix}{names.down}"
        return self.blocks.two_layers(x, up, down, config.hidden_act, width)

    def _gated(self, x: Value, prefix: str) -> Value:
        builder, embed = self.builder, self.config.hidden_size
        gate, up = (self._half(x, f"{prefix}{self.names.gate_up}", n) for n in range(2))
        hidden = builder.mul(builder.silu(gate), up)
        down = f"{prefix}{self.names.gated_down}"
        return self.blocks.linear(hidden, down, ("embed", embed), "mlp")

    def _half(self, x: Value, name: str, half: int) -> Value:
        """Emit gate or up, from its half of the fused projection."""
        params, loc, width = self.blocks.params, self.builder.loc, self.config.intermediate_size
        word, at, whole = ("gate", "up")[half], half * width, ("mlp", 2 * width)
        axes = {"mlp": width, "embed": self.config.hidden_size}
        weight = params.part(f"{name}.{word}.weight", f"{name}.weight", loc, at, whole, axes)
        shift = {"mlp": width}
        bias = params.part(f"{name}.{word}.bias", f"{name}.bias", loc, at, whole, shift)
        return self.builder.add(self.builder.contract(x, weight, over="embed"), bias)
