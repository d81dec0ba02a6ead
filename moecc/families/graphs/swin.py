"""The graph of a swin: stages of blocks that attend within windows, and merges of patches."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.graphs.vision import GRID, ImageEncoder, pixels_of
from moecc.families.swin import SwinConfig, SwinStage
from moecc.ir.graph import Graph, Value

NORM_EPS = 1e-5
"""Of the norms before the first stage and at merges, whatever the config says."""

SQUARES = (("window_row", "down"), ("window_column", "across"))
"""The axes of squares, and of places in one, that the height and the width are cut into."""

PENALTY = 100.0
"""What scores are lowered by between parts of a shifted window that are no neighbours."""


def build(config: SwinConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``pixels`` to ``hidden : f32[batch, seq, embed]``.

    The input is ``pixels : f32[batch, channel, height, width]``, of the size that the config says;
    the sequence is the patches of the last stage, row by row.
    """
    encoder = _WindowedEncoder(Parameters.of(config, request), config)
    builder, layer = encoder.builder, 0
    pixels = pixels_of(encoder.params.graph, config, request.batch)
    with builder.at("embed"):
        patches = builder.merge(encoder.patches(pixels), axes=GRID, into="seq", name="patches")
        hidden = encoder.norm(patches, config.names.around[0], eps=NORM_EPS)
        distances = encoder.distances(hidden)
    for stage in config.stages:
        shifted = None
        if stage.shift and stage.depth > 1:
            with builder.at("embed"):
                shifted = encoder.penalty(hidden, stage)
        for number in range(stage.depth):
            penalty = shifted if number % 2 else None
            hidden = encoder.block(hidden, stage, number, layer, distances, penalty)
            layer += 1
        if stage.number < len(config.stages) - 1:
            with builder.at(f"merges.{stage.number}"):
                hidden = encoder.merged(hidden, stage)
    with builder.at("norm"):
        hidden = encoder.norm(hidden, config.names.around[1])
    encoder.params.graph.set_output("hidden", hidden)
    encoder.add_head(hidden, request.head)
    return encoder.params.graph


@dataclass(frozen=True)
class _WindowedEncoder(ImageEncoder):
    """The parts of the encoder."""

    config: SwinConfig

    def distances(self, hidden: Value) -> tuple[Value, Value]:
        """Emit distances of queries and keys down and across a window, counted from 0.

        ``[down, kv_down]`` and ``[across, kv_across]``; that of a place from itself is one less
        than the side of a window.  They are rows and columns of the table of a block.
        """
        builder, stage = self.builder, self.config.stages[0]
        like = self._cut(hidden, stage.grid, stage.window)
        unit = builder.constant(value=1.0, dtype="i32", name="one")

        def along(axis: str) -> Value:
            places = builder.positions(like, axis=axis, name="places")
            keys = builder.rename(places, axis=axis, to=f"kv_{axis}")
            buckets = builder.signed_buckets(places, keys, buckets=2 * stage.window)
            return builder.sub(buckets, unit, name="distances")

        return along("down"), along("across")

    def _cut(self, x: Value, grid: tuple[int, int], side: int) -> Value:
        """Return `x`, ``[…, seq, …]``, in squares, whose places are the axes down and across."""
        builder = self.builder
        x = builder.split(x, axis="seq", into=tuple(zip(GRID, grid, strict=True)))
        for axis, count, parts in zip(GRID, grid, SQUARES, strict=True):
            into = ((parts[0], count // side), (parts[1], side))
            x = builder.split(x, axis=axis, into=into)
        return x

    def _prefix(self, stage: SwinStage, number: int) -> str:
        return f"{self.names.layer.format(layer=stage.number)}blocks.{number}."

    def _table_of_distances(self, stage: SwinStage, number: int) -> Value:
        """Return the biases of a block by distance, ``[dy, dx, head]``."""
        count = 2 * stage.window - 1
        name = f"{self._prefix(stage, number)}attention.self.relative_position_bias_table"
        axes = {"distance": count * count, "head": stage.heads}
        table = self.params.plain(name, self.builder.loc, **axes)
        return self.builder.split(table, axis="distance", into=(("dy", count), ("dx", count)))

    def bias(self, stage: SwinStage, number: int, distances: tuple[Value, Value]) -> Value:
        """Emit the biases of the scores of a block, by the places of query and key in a window."""
        builder, bias = self.builder, self._table_of_distances(stage, number)
        for axis, rows in zip(("dy", "dx"), distances, strict=True):
            bias = builder.embedding(bias, rows, axis=axis)
        bias = builder.merge(bias, axes=("down", "across"), into="seq")
        return builder.merge(bias, axes=("kv_down", "kv_across"), into="kv_seq", name="bias")

    def penalty(self, hidden: Value, stage: SwinStage) -> Value:
        """Emit what keys of a shifted window are lowered by, by window, ``[…, seq, kv_seq]``.

        A shift brings the first rows and columns of the image behind the last ones.  Places count
        as neighbours within the rows up to the last window, those of it before the shift, and
        those behind it, and columns likewise.
        """
        builder, (height, width) = self.builder, stage.grid
        numbers = builder.positions(hidden, axis="seq", name="places")
        places = builder.cast(numbers, dtype="f32")
        row = builder.pointwise(places, function=f"floor(div(a, {float(width)}))")
        column = builder.sub(places, builder.scale(row, by=float(width)))

        def part(x: Value, count: int, unit: float) -> Value:
            first, second = float(count - stage.window), float(count - stage.shift)
            bounds = (f"where(greater_equal(a, {n}), {unit}, 0.0)" for n in (first, second))
            return builder.pointwise(x, function="add({}, {})".format(*bounds))

        parts = builder.add(part(row, height, 3.0), part(column, width, 1.0))
        queries = self._windows(builder.cast(parts, dtype="i32", name="parts"), stage)
        difference = builder.signed_buckets(queries, self.as_keys(queries), buckets=18)
        middle = builder.constant(value=9.0, dtype="i32")
        together = builder.cast(builder.equal(difference, middle), dtype="f32", name="together")
        unit = builder.constant(value=1.0, name="one")
        return builder.scale(builder.sub(together, unit), by=PENALTY, name="penalty")

    def _windows(self, x: Value, stage: SwinStage) -> Value:
        """Return `x`, ``[…, seq, …]``, by window; then `seq` numbers the patches of one."""
        x = self._cut(x, stage.grid, stage.window)
        return self.builder.merge(x, axes=("down", "across"), into="seq", name="windows")

    def _without_windows(self, x: Value, stage: SwinStage) -> Value:
        builder, side = self.builder, stage.window
        x = builder.split(x, axis="seq", into=(("down", side), ("across", side)))
        for axis, parts in zip(GRID, SQUARES, strict=True):
            x = builder.merge(x, axes=parts, into=axis)
        return builder.merge(x, axes=GRID, into="seq")

    def _shifted(self, x: Value, stage: SwinStage, by: int) -> Value:
        """Return `x` with the first `by` rows and columns behind the others, or back again."""
        builder = self.builder
        x = builder.split(x, axis="seq", into=tuple(zip(GRID, stage.grid, strict=True)))
        for axis, count in zip(GRID, stage.grid, strict=True):
            at = by % count
            first = builder.slice(x, axis=axis, start=0, stop=at)
            others = builder.slice(x, axis=axis, start=at, stop=count)
            x = builder.join(others, first, axis=axis)
        return builder.merge(x, axes=GRID, into="seq", name="shifted")

    def block(
        self,
        hidden: Value,
        stage: SwinStage,
        number: int,
        layer: int,
        distances: tuple[Value, Value],
        penalty: Value | None,
    ) -> Value:
        """Emit one block: attention within windows, and a feed-forward block.

        Args:
          hidden: ``[batch, seq, embed]``.
          stage: its stage.
          number: which block of the stage it is.
          layer: which block of the model.
          distances: as `distances` makes them.
          penalty: of shifted windows; None: they are not shifted.
        """
        builder, names, prefix = self.builder, self.names, self._prefix(stage, number)
        first, second = (f"{prefix}{name}" for name in names.norms)
        with builder.at(f"layers.{layer}.attention"):
            x = self.norm(hidden, first)
            if penalty is not None:
                x = self._shifted(x, stage, stage.shift)
            bias = self.bias(stage, number, distances)
            mixed = self.attention(
                self._windows(x, stage), None, names.projections(prefix),
                (stage.heads, stage.width // stage.heads),
                bias=bias, penalty=penalty, unbiased=self.config.unbiased,
            )  # fmt: skip
            mixed = self._without_windows(mixed, stage)
            if penalty is not None:
                mixed = self._shifted(mixed, stage, -stage.shift)
            hidden = builder.add(hidden, mixed, name="hidden")
        with builder.at(f"layers.{layer}.ffn"):
            x = self.norm(hidden, second)
            up, down = f"{prefix}{names.fc_in}", f"{prefix}{names.fc_out}"
            width = self.config.block_width(stage.width)
            block = self.two_layers(x, up, down, self.config.hidden_act, width)
            return builder.add(hidden, block, name="hidden")

    def merged(self, hidden: Value, stage: SwinStage) -> Value:
        """Emit a patch for each square of four, ``[batch, seq, embed]``, of twice the width."""
        builder = self.builder
        prefix = f"{self.names.layer.format(layer=stage.number)}downsample."
        x = self._cut(hidden, stage.grid, 2)
        x = builder.merge(x, axes=("window_row", "window_column"), into="seq")
        x = builder.merge(x, axes=("across", "down", "embed"), into="square", name="squares")
        x = self.norm(x, f"{prefix}norm", eps=NORM_EPS)
        return self.linear(
            x, f"{prefix}reduction", ("embed", 2 * stage.width), "square", has_bias=False
        )
