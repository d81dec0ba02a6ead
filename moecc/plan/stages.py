"""Pipeline stages: what a step would take if devices had a part of the layers each.

Every stage has the same number of layers and of devices; micro-batches go through the stages one
after the other, one forward and one backward at a time (PipeDream-flush, Narayanan et al. 2021).
With p stages and m micro-batches, p − 1 of m + p − 1 turns are idle in each stage, and the first
stage keeps what the backward pass needs of min(m, p) micro-batches.  moecc prices stages and does
not lower them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moecc.errors import InputError
from moecc.ir.mesh import Mesh
from moecc.plan.estimate import Estimate, Estimator
from moecc.plan.layouts import problems
from moecc.plan.machines import Machine, sizes_of_kind
from moecc.plan.networks import Slices, Switch, Torus
from moecc.plan.parts import Part, Weight
from moecc.plan.strategy import StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.layout import Layout
from moecc.support.text import amount

OPTIMIZER = "optimizer"
"""The part that a stage does once, after all micro-batches."""


@dataclass(frozen=True)
class Staged:
    """A step in stages.

    Attributes:
      stages: how many.
      micro_batches: how many go through them.
      slowest: the stage that takes the longest, on its own devices, for all micro-batches.
      send_seconds: what it takes to send the activations of a micro-batch to the next stage.
      total_bytes: of the device that needs the most.
    """

    stages: int
    micro_batches: int
    slowest: Estimate
    send_seconds: float
    total_bytes: float

    @property
    def turns(self) -> int:
        """How often a stage takes its turn, idle ones included."""
        return self.micro_batches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its turns in which a stage is idle."""
        return (self.stages - 1) / self.turns

    @property
    def seconds(self) -> float:
        """The time of a step: all turns, each with a send forward and one back, and the update."""
        once = sum(p.seconds for p in self.slowest.parts if p.name == OPTIMIZER)
        turn = (self.slowest.seconds - once) / self.micro_batches
        return self.turns * (turn + 2 * self.send_seconds) + once


def part_of_machine(machine: Machine, stages: int) -> Machine:
    """Return the devices of one stage as a machine.

    Raises:
      InputError: there is no machine of that kind with so many devices.
    """
    devices, odd = divmod(machine.devices, stages)
    if not odd and machine.kind == "cpu" and isinstance(machine.network, Switch):
        return replace(machine, devices=devices, network=replace(machine.network, devices=devices))
    found = (m for m in sizes_of_kind(machine) if m.devices == devices)
    part = None if odd else next(found, None)
    if part is None:
        some = f"{amount(machine.devices, 'device')} {'is' if machine.devices == 1 else 'are'}"
        raise InputError(f"{some} not {stages} machines of that kind")
    return part


def stage_work(work: Workload, stages: int, *, last: bool) -> Workload:
    """Return what the first stage computes, or the last one.

    The first has what is before the layers, the last what is behind them; a parameter of both is in
    both.

    Raises:
      InputError: the layers are in several stacks, or not as many in each stage.
    """
    stacks = {layer.name for layer in work.layers}
    if len(stacks) != 1:
        raise InputError(f"stages are priced for one stack of layers, not {len(stacks)}")
    for layer in work.layers:
        if layer.count % stages:
            raise InputError(
                f"{layer.count} equal layers are not {stages} equal stages", where=layer.name
            )
    first = next(n for n, part in enumerate(work.parts) if part.in_layer)
    parts = tuple(
        replace(part, count=part.count // stages) if part.in_layer else part
        for number, part in enumerate(work.parts)
        if part.in_layer or (number > first) == last
    )
    return replace(
        work,
        parts=parts,
        layers=tuple(replace(layer, count=layer.count // stages) for layer in work.layers),
        weights=tuple(_weights(work, parts, last)),
        head=work.head if last else None,
    )


def _weights(work: Workload, parts: tuple[Part, ...], last: bool) -> Iterator[tuple[Weight, int]]:
    counts: dict[object, tuple[Weight, int]] = {}
    met = [(weight, part.count) for part in parts for weight in part.weights]
    known = {weight.shape for weight, _ in met}
    if last and work.head is not None:
        # A head that is tied to the embedding has a copy of it.
        met += [(weight, 1) for weight in work.head.weights if weight.shape not in known]
    for weight, count in met:
        key = (weight.shape, weight.of_experts)
        before = counts[key][1] if key in counts else 0
        counts[key] = counts[key][0] if key in counts else weight, before + count
    yield from counts.values()


def stage_meshes(mesh: Mesh, stages: int) -> Iterator[Mesh]:
    """Yield meshes of the devices of one stage: one axis is that much smaller."""
    for name, size in mesh.axes:
        if size % stages == 0:
            axes = tuple((n, s // stages if n == name else s) for n, s in mesh.axes)
            yield Mesh(tuple((n, s) for n, s in axes if s > 1) or (("data", 1),))


def staged(
    work: Workload, machine: Machine, config: StepConfig, like: Strategy, stages: int
) -> Staged:
    """Return the fastest step in so many stages, on meshes like that of a plan, that fits.

    Args:
      work: the model and one micro-batch of `config`.
      machine: all devices.
      config: what is given; its micro-batches are those that go through the stages.
      like: the plan whose mesh is divided.
      stages: how many.

    Raises:
      InputError: the layers or devices do not divide, or nothing fits.
    """
    ends = [stage_work(work, stages, last=last) for last in (False, True)]
    found = [
        one
        for mesh in stage_meshes(like.layout.mesh, stages)
        for remat in work.remats
        if (one := _on(ends, machine, config, _strategy(like, mesh, remat), stages)) is not None
    ]
    fitting = [one for one in found if one.total_bytes <= machine.usable_bytes]
    if not fitting:
        what = "no mesh of a stage divides a micro-batch" if not found else "no stage fits"
        raise InputError(what, found=f"{config.micro_batches} micro-batches")
    return min(fitting, key=lambda one: one.seconds)


def _strategy(like: Strategy, mesh: Mesh, remat: str) -> Strategy:
    layout = like.layout
    made = Layout(mesh, layout.experts, layout.dense_weights, layout.replicated, layout.own)
    return replace(like, layout=made, remat=remat)


def _on(
    ends: list[Workload], machine: Machine, config: StepConfig, strategy: Strategy, stages: int
) -> Staged | None:
    """Return a step whose stages use a strategy; None where it is not legal."""
    layout, part = strategy.layout, part_of_machine(machine, stages)
    if any(problems(layout, ends[0])) or not _reaches(strategy):
        return None
    estimates = [Estimator(work, part, config).estimate(strategy) for work in ends]
    flying = min(config.micro_batches, stages) - 1
    first, last = (e.memory.total for e in estimates)
    # The first stage is furthest ahead of the backward pass.
    most = max(first + flying * estimates[0].memory.activations, last)
    sent = _boundary_bytes(ends[0], layout, config)
    return Staged(
        stages, config.micro_batches, max(estimates, key=lambda e: e.seconds),
        sent / _link(part, machine), most,
    )  # fmt: skip


def _reaches(strategy: Strategy) -> bool:
    """Whether the way to the experts is one for experts that are on several devices, or not."""
    apart = bool(strategy.layout.split(strategy.layout.sharded("expert", of_rows=True)))
    return (strategy.via != "local") == (apart and strategy.layout.experts > 0)


def _boundary_bytes(work: Workload, layout: Layout, config: StepConfig) -> float:
    """Return what one device sends to the next stage, of one micro-batch."""
    inputs = next(layer.inputs for layer in work.layers)
    elements = sum(shape.elements for shape in inputs) / layout.shards["batch"]
    return elements / layout.shards["seq"] * config.dtype.itemsize_bytes


def _link(part: Machine, machine: Machine) -> float:
    """Return the bytes per second that a device sends to the same one of the next stage."""
    network, whole = part.network, machine.network
    if isinstance(whole, Slices):
        # Stages are cut along the slices first.
        return whole.outer_bytes_per_second
    if isinstance(network, Torus):
        return min(dim.link_bytes_per_second for dim in network.dims)
    assert isinstance(network, Switch), "slices are of tori"
    between = network.node_bytes_per_second / network.per_node
    return between if part.devices >= network.per_node else network.link_bytes_per_second
