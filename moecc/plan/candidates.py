"""What a search goes through: every legal layout, exchange and rematerialisation of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.mesh import Mesh
from moecc.plan.exchanges import SLICED
from moecc.plan.layouts import check_layout, layouts, problems
from moecc.plan.machines import Machine
from moecc.plan.meshes import check_devices, searched_meshes
from moecc.plan.strategy import Strategy
from moecc.plan.workload import Workload
from moecc.sharding.layout import Layout
from moecc.sharding.legal import refusals
from moecc.sharding.vias import LOCAL, WAYS, Slots, Via

_NEEDS = {
    "ragged": "ragged is for models without a capacity",
    "hierarchical": "hierarchical is for experts on two mesh axes: --rules expert-hierarchical",
}


@dataclass(frozen=True)
class Constraints:
    """What the user fixed; None leaves it to the search."""

    mesh: Mesh | None = None
    via: str | None = None
    remat: str | None = None
    dense_weights: str | None = None
    rules: tuple[str, ...] | None = None


def strategies(
    work: Workload, machine: Machine, constraints: Constraints, train: bool
) -> Iterator[Strategy]:
    """Yield every strategy that is legal and agrees with `constraints`."""
    remats = work.remats if constraints.remat is None else (constraints.remat,)
    for layout in _layouts(work, machine, constraints):
        for via in _vias(layout, work, constraints):
            dispatch = "grouped" if work.dropless and via != "capacity" else "index"
            for remat in remats if train else ("none",):
                yield Strategy(layout, via, dispatch, remat)
                if via in SLICED and layout.tensor_axes:
                    yield Strategy(layout, via, dispatch, remat, sliced=True)


def _vias(layout: Layout, work: Workload, constraints: Constraints) -> Iterator[str]:
    """Yield the ways to the experts that a layout has and that agree with `constraints`."""
    for name in legal_vias(layout, work):
        if constraints.via in (None, name) and (name == "replicated") == layout.replicated:
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


def _layouts(work: Workload, machine: Machine, constraints: Constraints) -> Iterator[Layout]:
    tried: Iterable[Mesh] = searched_meshes(machine.devices, work.experts, constraints.rules)
    for mesh in tried if constraints.mesh is None else (constraints.mesh,):
        if constraints.rules is None:
            found = layouts(mesh, work)
            yield from (x for x in found if constraints.dense_weights in (None, x.dense_weights))
            continue
        layout = Layout.ruled(mesh, work.experts, constraints.rules)
        if not any(problems(layout, work)):
            yield layout


def check_constraints(work: Workload, machine: Machine, constraints: Constraints) -> None:
    """Check what the user fixed.

    Raises:
      InputError: the mesh has another number of devices, or does not divide what it splits; the
        exchange does not suit model or mesh.
    """
    if constraints.via == "hierarchical" and constraints.rules is None:
        raise InputError(
            "by its names, a mesh shards experts over one axis", hint=_NEEDS["hierarchical"]
        )
    if constraints.mesh is None:
        return
    check_devices(constraints.mesh, machine.devices, machine.name)
    if constraints.rules is None:
        layout = Layout(constraints.mesh, work.experts, "whole", constraints.via == "replicated")
    else:
        layout = Layout.ruled(constraints.mesh, work.experts, constraints.rules)
    check_layout(layout, work)
    devices, fitting = layout.shards["expert"], legal_vias(layout, work)
    if constraints.via is not None and constraints.via not in fitting:
        raise InputError(
            f"experts on {devices} devices cannot be reached via {constraints.via}",
            where=f"mesh {constraints.mesh}",
            expected=", ".join(fitting),
            hint=_NEEDS.get(constraints.via),
        )
