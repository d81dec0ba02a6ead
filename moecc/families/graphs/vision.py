"""The graph of an encoder of images: patches, a token for all of them, and a Transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi

from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.vision import Dinov2Config, Dinov3ViTConfig, VisionConfig
from moecc.ir.graph import Graph, Value
from moecc.types import F32, Size, tensor

GRID = ("height", "width")
"""The axes of patches."""


def build(config: VisionConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``pixels`` to ``hidden : f32[batch, seq, embed]``.

    The input is ``pixels : f32[batch, channel, height, width]``, of the size that the config says;
    the sequence is a token for the whole image, and then the patches, row by row.
    """
    encoder = ImageEncoder(Parameters.of(config, request), config)
    graph = encoder.params.graph
    pixels = pixels_of(graph, config, request.batch)
    rotate = None
    with encoder.builder.at("embed"):
        patches = encoder.patches(pixels)
        if isinstance(config, Dinov3ViTConfig):
            rotate = encoder.rotation(patches, config)
        hidden = encoder.norm(encoder.embed(patches), config.names.around[0])
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(hidden, layer, rotate)
    with encoder.builder.at("norm"):
        hidden = encoder.norm(hidden, config.names.around[1])
    graph.set_output("hidden", hidden)
    encoder.add_head(hidden, request.head)
    return graph


def pixels_of(graph: Graph, config: VisionConfig, batch: Size) -> Value:
    """Return a new input for images of the size that the config says."""
    height, width = config.image_size
    sizes = {"channel": config.num_channels, "height": height, "width": width}
    return graph.input("pixels", tensor(F32, batch=batch, **sizes))


@dataclass(frozen=True)
class ImageEncoder(Blocks):
    """The parts of the encoder."""

    config: VisionConfig

    def patches(self, pixels: Value) -> Value:
        """Emit the patches, ``[batch, embed, height, width]``."""
        builder, config, params = self.builder, self.config, self.params
        loc, embed, side, name = (
            builder.loc, config.hidden_size, config.patch_size, config.patches_name
        )  # fmt: skip
        axes = {"embed": embed, "channel": config.num_channels, "down": side, "across": side}
        weight = params.plain(f"{name}.weight", loc, **axes)
        patches = builder.convolve(
            pixels,
            weight,
            over="channel",
            along=GRID,
            taps=("down", "across"),
            stride=side,
            name="patches",
        )
        if config.patch_bias:
            bias = params.plain(f"{name}.bias", loc, embed=embed)
            patches = builder.add(patches, bias, name="patches")
        return patches

    def embed(self, patches: Value) -> Value:
        """Emit the tokens of the image and the patches, with their positions added."""
        builder, config, count = self.builder, self.config, self.config.patches
        patches = builder.merge(patches, axes=GRID, into="seq", name="patches")
        tokens = [self.names.embedding] if self.names.embedding else []
        if not self.names.positions:
            registers = config.registers if isinstance(config, Dinov3ViTConfig) else 0
            table = self._table("embeddings.register_tokens", registers) if registers else None
            values = [self._table(tokens[0], 1), *([] if table is None else [table])]
            return self._behind(values, patches)
        table = self._table(self.names.positions, len(tokens) + count)
        if not tokens:
            return builder.add(patches, table, name="hidden")
        of_image, of_patches = (
            builder.slice(table, axis="seq", start=start, stop=stop)
            for start, stop in ((0, 1), (1, count + 1))
        )
        patches = builder.add(patches, of_patches, name="patches")
        image = self._table(tokens[0], 1)
        return self._behind([builder.add(image, of_image, name="image")], patches)

    def _table(self, name: str, size: int) -> Value:
        """Return a table of tokens or positions, ``[seq, embed]``."""
        params, embed = self.params, self.config.hidden_size
        if not self.config.is_flat:
            return params.without_axis(name, self.builder.loc, "one", seq=size, embed=embed)
        if name != self.names.embedding:
            return params.plain(name, self.builder.loc, seq=size, embed=embed)
        return params.with_axis(name, self.builder.loc, "seq", embed=embed)

    def _behind(self, tokens: Sequence[Value], patches: Value) -> Value:
        """Emit tokens of every image, and its patches behind them."""
        builder, hidden = self.builder, patches
        for token in reversed(tokens):
            size = token.type["seq"].size
            assert isinstance(size, int), "the number of tokens is known"
            like = builder.slice(patches, axis="seq", start=0, stop=size)
            hidden = builder.join(builder.broadcast(token, like), hidden, axis="seq", name="hidden")
        return hidden

    def rotation(self, patches: Value, config: Dinov3ViTConfig) -> Callable[[Value], Value]:
        """Return what rotates the heads of patches by the places of their centres.

        A half of the pairs of a head belongs to each direction.  Those of a direction are brought
        together, in queries and keys alike, which changes no product of the two.

        Args:
          patches: with the axes ``height`` and ``width``.
          config: the config.
        """
        builder, quarter = self.builder, config.head_dim // 4
        counts = {
            axis: n // config.patch_size for axis, n in zip(GRID, config.image_size, strict=True)
        }
        tables = {}
        for axis, count in counts.items():
            places = builder.positions(patches, axis=axis, name="places")
            # The centre of a patch is (2 · place + 1 − count) / count.
            offset = builder.constant(value=1.0 - count, dtype="i32")
            centres = builder.add(builder.add(places, places), offset, name="centres")
            tables[axis] = builder.rope(
                centres, axis="head_dim", size=2 * quarter, theta=config.rope_theta,
                scaling="linear", factor=count / (2 * pi),
            )  # fmt: skip

        def rotate(heads: Value) -> Value:
            fixed = 1 + config.registers
            total = fixed + config.patches
            parts = []
            for number, (cos, sin) in enumerate(tables.values()):
                halves = (
                    builder.slice(heads, axis="head_dim", start=at, stop=at + quarter)
                    for at in (number * quarter, (number + 2) * quarter)
                )
                part = builder.join(*halves, axis="head_dim")
                others = builder.slice(part, axis="seq", start=0, stop=fixed)
                turned = builder.slice(part, axis="seq", start=fixed, stop=total)
                turned = builder.split(turned, axis="seq", into=tuple(counts.items()))
                turned = builder.rotate(turned, cos, sin, axis="head_dim")
                turned = builder.merge(turned, axes=GRID, into="seq")
                parts.append(builder.join(others, turned, axis="seq"))
            return builder.join(*parts, axis="head_dim")

        return rotate

    def layer(self, hidden: Value, layer: int, rotate: Callable[[Value], Value] | None) -> Value:
        """Emit one layer: attention and feed-forward block, each added to what it reads."""
        config, names = self.config, self.names
        prefix = names.layer.format(layer=layer)
        first, second = (f"{prefix}{name}" for name in names.norms)
        with self.builder.at(f"layers.{layer}.attention"):
            x = self.norm(hidden, first)
            heads = (config.num_attention_heads, config.head_dim)
            block = self.attention(
                x, None, names.projections(prefix), heads,
                unbiased=config.unbiased, rotate=rotate,
            )  # fmt: skip
            hidden = self._added(hidden, block, prefix, 0)
        with self.builder.at(f"layers.{layer}.ffn"):
            x = self.norm(hidden, second)
            has_bias = not isinstance(config, Dinov3ViTConfig) or config.mlp_bias
            if config.is_gated:
                act = "silu" if isinstance(config, Dinov2Config) else config.hidden_act
                block = self.gated(x, prefix, act, has_bias=has_bias)
            else:
                block = self.feed_forward(x, prefix, has_bias=has_bias)
            return self._added(hidden, block, prefix, 1)

    def _added(self, hidden: Value, block: Value, prefix: str, number: int) -> Value:
        if self.names.scales:
            name = f"{prefix}{self.names.scales[number]}"
            scale = self.params.plain(name, self.builder.loc, embed=self.config.hidden_size)
            block = self.builder.mul(block, scale)
        return self.builder.add(hidden, block, name="hidden")
