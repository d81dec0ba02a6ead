"""Routers that follow from statistics of the model, and which statistics they need."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.analysis.ffn import FFNBlock
from moecc.errors import Problem
from moecc.pipeline.passes import NO_STATISTICS, Statistics
from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType
from moecc.weights.arithmetic import Moment
from moecc.weights.branches import STATISTICS, name_in
from moecc.weights.draws import derive_key
from moecc.weights.expr import Expr, Source
from moecc.weights.fits import Fitted
from moecc.weights.movement import Index, Permute, Rename, Slice, Split, Stack
from moecc.weights.orders import I32, Clusters, Permutation
from moecc_passes.upcycle.lift import Division, padded
from moecc_passes.upcycle.options import UpcycleOptions
from moecc_passes.upcycle.router_init import repeated

OTHER = "other"
"""The second axis of a square: covariances, counts of pairs."""


def statistic(block: FFNBlock, name: str, *axes: Axis, dtype: str = "f32") -> Source:
    """Return a statistic of the location of `block`."""
    type = TensorType(I32 if dtype == "i32" else F32, axes)
    return Source(name_in(STATISTICS, f"{block.loc}.{name}"), type)


def neuron_order(
    item: UpcycleOptions, block: FFNBlock, shared: int, seed: int, slots: str
) -> Expr | None:
    """Return the order that the neurons of a block are divided in; None for their own.

    Args:
      item: the options.
      block: the block.
      shared: the neurons of the shared expert.
      seed: of the conversion.
      slots: the key of the block's draws.
    """
    padding = item.padding(block.width, shared)
    if item.split == "random":
        neurons = Axis(block.inner, block.width + padding)
        return Permutation(TensorType(I32, (neurons,)), derive_key(seed, f"{slots}/split"))
    if item.split == "activation":
        neurons, others = Axis(block.inner, block.width), Axis(OTHER, block.width)
        pairs: Expr = statistic(block, "hidden.pairs", neurons, others, dtype="i32")
        for axis in (block.inner, OTHER) if padding else ():
            # What is added is never active.
            pairs = padded(pairs, axis, padding, with_zeros=True)
        return Clusters(pairs, block.inner, shared, item.experts)
    return None


def fitted_weight(
    item: UpcycleOptions, block: FFNBlock, division: Division, texts: tuple[str, ...]
) -> Expr:
    """Return the rows of a router that is fitted to statistics, ``[expert, embed]``.

    Args:
      item: the options.
      block: the block.
      division: how its neurons are divided.
      texts: the texts of the statistics.
    """
    embed = block.x.type[block.outer]
    cross = _of_parts(block, division, embed) if item.is_split else _of_texts(item, block, texts)
    rows = Fitted(
        statistic(block, "input.covariance", embed, Axis(OTHER, embed.size)),
        statistic(block, "input.mean", embed), cross,
        item.router_ridge if item.router_init == "ridge" else 0.0, item.router_std,
    )  # fmt: skip
    if item.is_split or division.slices == 1:
        return rows
    return repeated(Rename(rows, "expert", "copy"), division.slices)


def _of_parts(block: FFNBlock, division: Division, embed: Axis) -> Expr:
    """Return the covariances with the mean size of each part's neurons."""
    inner = block.inner
    cross = statistic(block, "hidden.cross", embed, Axis(inner, block.width))
    # Ordered in its own layout: a row of the statistics is read once, not once a neuron.
    whole = division.ordered(cross, is_last=True)
    parts = Slice(whole, inner, division.shared, division.dense) if division.shared else whole
    cut = Split(parts, inner, (("expert", division.slices), (inner, division.width)))
    return Permute(Moment("mean", cut, None, (embed.name, "expert")), ("expert", embed.name))


def _of_texts(item: UpcycleOptions, block: FFNBlock, texts: tuple[str, ...]) -> Expr:
    """Return the covariances with which text a token is of, those of the experts' texts."""
    embed = block.x.type[block.outer]
    cross = statistic(block, "texts.cross", Axis("text", len(texts)), embed)
    if not item.models:
        return Rename(cross, "text", "expert")
    rows = tuple(Index(cross, "text", texts.index(name)) for name in item.models)
    return Stack(rows, "expert")


def unread(item: UpcycleOptions, statistics: Statistics | None) -> list[Problem]:
    """Return why statistics do not suit the options, whatever the model."""
    if not (item.is_fitted or item.split == "activation"):
        return []
    if statistics is None:
        return [NO_STATISTICS]
    if not item.is_fitted or item.is_split:
        return []
    copies = item.experts // item.granularity
    if item.models:
        return [
            Problem("no text has the name of the model", "sources", ", ".join(statistics.texts),
                    name, f"moecc capture --text {name}=FILE")
            for name in dict.fromkeys(item.models) if name not in statistics.texts
        ]  # fmt: skip
    if len(statistics.texts) == copies:
        return []
    return [Problem(
        "each copy has a text that it is for", "router-init",
        f"{copies} texts", ", ".join(statistics.texts), "moecc capture --text A --text B …",
    )]  # fmt: skip


def missing(item: UpcycleOptions, block: FFNBlock, statistics: Statistics | None) -> Problem | None:
    """Return which statistic of a block is missing or of another shape, or None."""
    if statistics is None:
        return None
    return statistics.problem(block.loc, dict(_wanted(item, block, statistics)))


def _wanted(
    item: UpcycleOptions, block: FFNBlock, statistics: Statistics
) -> Iterator[tuple[str, tuple[int, ...]]]:
    embed, width = block.embed, block.width
    if item.split == "activation":
        yield "hidden.pairs", (width, width)
    if item.is_fitted:
        yield "input.covariance", (embed, embed)
        yield "input.mean", (embed,)
        if item.is_split:
            yield "hidden.cross", (embed, width)
        else:
            yield "texts.cross", (len(statistics.texts), embed)
