"""The layouts that a plan tries, and why a layout does not suit a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from moecc.errors import InputError, Problem
from moecc.ir.mesh import Mesh, nearest_divisor
from moecc.plan.batches import Batch
from moecc.plan.workload import Workload
from moecc.sharding.layout import DENSE_WEIGHTS, Layout
from moecc.support.text import amount


def layouts(mesh: Mesh, work: Workload) -> Iterator[Layout]:
    """Yield the layouts of `work` that the names of the mesh's axes stand for."""
    for dense, replicated in product(DENSE_WEIGHTS, (False, True)):
        layout = Layout(mesh, work.experts, dense, replicated)
        apart = layout.has_expert_axis
        if (replicated and not apart) or (
            dense == "split" and not (apart or "data" in layout.sizes)
        ):
            continue
        if not any(problems(layout, work)):
            yield layout


def problems(layout: Layout, work: Workload) -> Iterator[Problem]:
    """Yield why a layout does not suit `work`: the axis, its size, the nearest that would."""
    where = f"mesh {layout.mesh}"
    yield from batch_problems(layout, work.batch)
    for name, size in work.tensor_sizes.items():
        parts = layout.shards[name]
        if size % parts:
            yield Problem(
                f"{' x '.join(layout.tensor_axes)} does not divide the axis {name}",
                where,
                f"a divisor of {size}",
                str(parts),
                f"{nearest_divisor(size, parts)} would",
            )
    yield from _attention_problems(layout)
    for name, size in layout.sizes.items():
        if size > 1 and name not in layout.used:
            dense = name == "expert" and not work.experts
            yield Problem(
                "the mesh has an axis expert, and the model has no experts" if dense
                else f"nothing is sharded over the mesh axis {name!r}",
                where,
            )  # fmt: skip
    experts = layout.shards["expert"]
    if work.experts and work.experts % experts:
        yield Problem(
            f"{' x '.join(layout.expert_axes)} does not divide the experts"
            if experts < work.experts
            else "more devices for experts than experts",
            where,
            f"a divisor of {work.experts}",
            str(experts),
            f"{nearest_divisor(work.experts, experts)} would",
        )  # fmt: skip


def batch_problems(layout: Layout, batch: Batch) -> Iterator[Problem]:
    """Yield why a batch, whatever the model, cannot be sharded so."""
    where = f"mesh {layout.mesh}"
    shards, parts = layout.shards["batch"], layout.shards["seq"]
    if batch.sequences % shards:
        yield Problem(
            f"{' x '.join(layout.batch_axes)} does not divide the batch",
            where,
            f"a divisor of {amount(batch.sequences, 'sequence')}",
            str(shards),
            f"{nearest_divisor(batch.sequences, shards)} would",
        )
    for name, size in batch.lengths:
        if size % parts:
            yield Problem(
                f"{' x '.join(layout.sequence_axes)} does not divide the sequences",
                where,
                f"a divisor of {amount(size, 'token')} ({name})",
                str(parts),
                f"{nearest_divisor(size, parts)} would",
            )


def _attention_problems(layout: Layout) -> Iterator[Problem]:
    """Yield why attention cannot be sharded so."""
    if not set(layout.split(layout.sequence_axes)) <= set(layout.tensor_axes):
        yield Problem(
            "attention over a sequence in parts is not lowered: each device would do all of it",
            f"mesh {layout.mesh}",
            "a mesh axis that shards heads, too: tensor-parallel,sequence-parallel",
            " x ".join(layout.sequence_axes),
        )


def check_layout(layout: Layout, work: Workload) -> None:
    """Check that every axis divides what it splits.

    Raises:
      InputError: with every axis that does not.
    """
    found = list(problems(layout, work))
    if found:
        raise InputError(found)
