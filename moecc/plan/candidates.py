"""What a search goes through: every legal layout, exchange and rematerialisation of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from moecc.errors import InputError, Problem
from moecc.ir.mesh import Mesh, nearest_divisor
from moecc.plan.batches import Batch
from moecc.plan.collectives import SLICED
from moecc.plan.machines import Machine
from moecc.plan.step import AXES, StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.layout import DENSE_WEIGHTS, Layout
from moecc.sharding.rules import mesh_axes
from moecc.sharding.vias import LOCAL, WAYS, Slots, Via, refusals
from moecc.support.text import amount

# The layouts that a plan tries, and why a layout does not suit a model.


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


# The meshes of a machine: a grid of all its devices, whose axes have the names of layouts.

MOST_TENSOR = 64
"""The search splits neurons over at most so many devices; a mesh that is given may have more."""


def check_devices(mesh: Mesh, devices: int, machine: str) -> None:
    """Check that a mesh has as many devices as a machine.

    Raises:
      InputError: it has more or fewer; the size of its last axis that would do is suggested.
    """
    if mesh.devices == devices:
        return
    name, size = mesh.axes[-1]
    rest = mesh.devices // size
    raise InputError(
        "the mesh and the machine have different numbers of devices",
        where=f"mesh {mesh}",
        expected=f"{devices} devices of {machine}",
        found=str(mesh.devices),
        hint=f"{name}:{devices // rest} would" if devices % rest == 0 else None,
    )


def searched_meshes(
    devices: int, experts: int, rules: Sequence[str] | None = None
) -> Iterator[Mesh]:
    """Yield the meshes that a search tries, skipping those equivalent up to renaming axes.

    Args:
      devices: of the machine.
      experts: of a layer, 0 in a dense model.
      rules: the layouts whose axes they may have; None: `AXES`.
    """
    if rules is not None:
        # Layouts reject meshes with an axis over which nothing is sharded.
        yield from meshes(devices, mesh_axes(rules))
        return
    for mesh in meshes(devices):
        data = mesh.sizes.get("data", 1)
        if mesh.sizes.get("model", 1) > MOST_TENSOR:
            continue
        # Experts would be sharded over data, as they are over an axis of their own.
        if experts and data > 1 and "expert" not in mesh.names and experts % data == 0:
            continue
        yield mesh


def meshes(devices: int, names: Sequence[str] = AXES) -> Iterator[Mesh]:
    """Yield every mesh of `devices` devices over axes of `names`; one device is ``data:1``."""
    for sizes in _products(devices, len(names)):
        axes = tuple((n, s) for n, s in zip(names, sizes, strict=True) if s > 1)
        yield Mesh(axes or ((names[0], 1),))


def _products(of: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield every tuple of `count` numbers whose product is `of`."""
    if count == 1:
        yield (of,)
        return
    for size in (d for d in range(1, of + 1) if of % d == 0):
        for rest in _products(of // size, count - 1):
            yield (size, *rest)


_NEEDS = {
    "ragged": "ragged is for models without a capacity",
    "hierarchical": "hierarchical is for experts on two mesh axes: --rules expert-hierarchical",
}


def strategies(work: Workload, machine: Machine, config: StepConfig) -> Iterator[Strategy]:
    """Yield every strategy that is legal and agrees with the settings that `config` fixes."""
    remats = work.remats if config.remat is None else (config.remat,)
    for layout in _layouts(work, machine, config):
        for via in _vias(layout, work, config):
            dispatch = "grouped" if work.dropless and via != "capacity" else "index"
            for remat in remats if config.train else ("none",):
                yield Strategy(layout, via, dispatch, remat)
                if via in SLICED and layout.tensor_axes:
                    yield Strategy(layout, via, dispatch, remat, sliced=True)


def _vias(layout: Layout, work: Workload, config: StepConfig) -> Iterator[str]:
    """Yield the ways to the experts that a layout has and that agree with `config`."""
    for name in legal_vias(layout, work):
        if config.via in (None, name) and (name == "replicated") == layout.replicated:
            yield name


def legal_vias(layout: Layout, work: Workload) -> list[str]:
    """Return the ways to the experts that a layout has."""
    tokens, experts = (
        layout.split(axes)
        for axes in (layout.sharded("batch"), layout.sharded("expert", of_rows=True))
    )
    if not work.experts or not experts:
        return [LOCAL]
    return [way.name for way in WAYS if _suits(way, tokens, experts, work)]


def _suits(way: Via, tokens: tuple[str, ...], experts: tuple[str, ...], work: Workload) -> bool:
    """Whether a way suits a layout; a capacity makes slots of fixed number of any model's."""
    slots: Slots = "ragged" if work.dropless and not way.is_bounded else "fixed"
    return not any(refusals(way, tokens, experts, slots))


def _layouts(work: Workload, machine: Machine, config: StepConfig) -> Iterator[Layout]:
    tried: Iterable[Mesh] = searched_meshes(machine.devices, work.experts, config.layout_names)
    for mesh in tried if config.device_mesh is None else (config.device_mesh,):
        if config.layout_names is None:
            found = layouts(mesh, work)
            yield from (x for x in found if config.dense_weights in (None, x.dense_weights))
            continue
        layout = Layout.ruled(mesh, work.experts, config.layout_names)
        if not any(problems(layout, work)):
            yield layout


def check_constraints(work: Workload, machine: Machine, config: StepConfig) -> None:
    """Check the settings that the user fixed.

    Raises:
      InputError: the mesh has another number of devices, or does not divide what it splits; the
        exchange does not suit model or mesh.
    """
    if config.via == "hierarchical" and config.layout_names is None:
        raise InputError(
            "by its names, a mesh shards experts over one axis", hint=_NEEDS["hierarchical"]
        )
    if config.device_mesh is None:
        return
    check_devices(config.device_mesh, machine.devices, machine.name)
    if config.layout_names is None:
        layout = Layout(config.device_mesh, work.experts, "whole", config.via == "replicated")
    else:
        layout = Layout.ruled(config.device_mesh, work.experts, config.layout_names)
    check_layout(layout, work)
    devices, fitting = layout.shards["expert"], legal_vias(layout, work)
    if config.via is not None and config.via not in fitting:
        raise InputError(
            f"experts on {devices} devices cannot be reached via {config.via}",
            where=f"mesh {config.device_mesh}",
            expected=", ".join(fitting),
            hint=_NEEDS.get(config.via),
        )
