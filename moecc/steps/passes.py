"""The passes from a model's graph to that of a step: mode, losses, mesh, collectives, rolling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.pipeline.passes import Context
from moecc.pipeline.registry import installed
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.sharding.vias import LOCAL


@dataclass(frozen=True)
class Bound:
    """The bound on an expert's rows: a factor, and what it multiplies (see ``assign_slots``)."""

    factor: float
    convention: str = ""


@dataclass(frozen=True)
class MeshPasses:
    """How a graph is laid on a mesh, with collectives of its own.

    Attributes:
      mesh: the mesh, as text.
      rules: layouts by name or file.
      via: how tokens reach experts, of `moecc.sharding.vias`.
      sliced: whether devices along ``model`` each send a part of a row.
      chunks: in how many parts rows are exchanged.
    """

    mesh: str
    rules: tuple[str, ...]
    via: str = LOCAL
    sliced: bool = False
    chunks: int = 1


@dataclass(frozen=True)
class StepPasses:
    """What the graph of a step is, by the passes that make it.

    Attributes:
      mode: ``train`` or ``eval``.
      documents: of a row, ``several`` or ``one``, kept apart by segments; None without segments.
      tied: whether logits are made by the embedding, of an encoder without a head.
      routed: whether the model has experts; without, nothing is specialised.
      bound: the bound on an expert's rows; None for what the graph says.
      groups: token groups of a micro-batch; None for what the graph says.
      balanced: whether tokens take experts in turn, to time a step.
      fused: whether attention is one operation, whose scores are in no memory.
      weighted: whether rows are weighted at their experts, see `weights_rows`.
      noise: options of ``specialize`` by which training is perturbed.
      losses: options of ``add-losses``; None where none are added.
      mesh: where it is laid on a mesh of its own collectives.
      rolled: whether equal layers are a scan.
      remat: what the backward pass computes again: ``none``, ``full``, or ``save``.
      save: names that are kept under ``save``.
      split: the mesh axis along which what goes from layer to layer is kept in parts.
    """

    mode: str = "train"
    documents: str | None = None
    tied: bool = False
    routed: bool = True
    bound: Bound | None = None
    groups: int | None = None
    noise: dict[str, float] = field(default_factory=dict)
    losses: dict[str, object] | None = field(default_factory=dict)
    balanced: bool = False
    fused: bool = True
    weighted: bool = False
    mesh: MeshPasses | None = None
    rolled: bool = True
    remat: str = "none"
    save: tuple[str, ...] = ()
    split: str | None = None

    def __str__(self) -> str:
        return ",".join(self._passes())

    def _passes(self) -> Iterator[str]:
        if self.documents is not None:
            yield _pass("pack-segments", {"documents": self.documents})
        if self.tied:
            yield "tie-head{only=true}"
        if self.routed:
            yield specialize(self.mode, self.bound, self.groups, self.noise)
        if self.losses is not None:
            yield _pass("add-losses", self.losses)
        if self.balanced:
            yield "force-balance"
        if self.fused:
            yield "fuse-attention"
        if self.weighted and self.routed:
            yield "weight-rows"
        yield "cse"
        if self.mesh is not None:
            yield from _on_mesh(self.mesh)
            yield "cse"
        if self.rolled:
            options: dict[str, object] = {"remat": self.remat}
            if self.save:
                options["save"] = ",".join(self.save)
            if self.split is not None:
                options["split"] = self.split
            yield _pass("roll-layers", options)


def weights_rows(remat: str, on_mesh: bool) -> bool:
    """Return whether rows are weighted at their experts in a step of training.

    It spares what is made again and sent again.  Where nothing is, on a CPU it costs more than it
    spares: 12 % of the time of a dropless layer of 8 × 1,024 neurons.
    """
    return remat != "none" or on_mesh


def specialize(
    mode: str, bound: Bound | None, groups: int | None, noise: Mapping[str, float] | None = None
) -> str:
    """Return the pass that specialises a graph for `mode`."""
    options: dict[str, object] = {"mode": mode}
    if bound is not None:
        options["capacity-factor"] = bound.factor
        if bound.convention:
            options["convention"] = bound.convention
    if groups is not None:
        options["groups"] = groups
    options |= noise or {}
    return _pass("specialize", options)


def _on_mesh(mesh: MeshPasses) -> Iterator[str]:
    yield f"annotate-sharding{{mesh={mesh.mesh} rules={','.join(mesh.rules)}}}"
    if mesh.via != LOCAL:
        options = " slice=model" if mesh.sliced else ""
        options += f" chunks={mesh.chunks}" if mesh.chunks > 1 else ""
        yield f"expert-parallel{{via={mesh.via}{options}}}"
    yield "lower-collectives"


def _pass(name: str, options: dict[str, object]) -> str:
    if not options:
        return name
    return f"{name}{{{' '.join(f'{n}={_value(v)}' for n, v in options.items())}}}"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_passes(graph: Graph, passes: str) -> None:
    """Run the pipeline text `passes` over `graph`, where passes may match nothing."""
    pipeline = Pipeline.parse(passes, installed())
    run_pipeline(graph, pipeline, context=Context(allow_unmatched=True))


def planned_graph(graph: Graph, train: bool) -> Graph:
    """Return `graph`, which stays as it is, with what every step fuses: as a plan takes it.

    Rolled layers are left to the plan, which rejects them.

    Args:
      graph: the model's.
      train: whether the step is one of training, which weights rows at their experts.
    """
    if any(node.body is not None for node in graph):
        return graph
    made = clone(graph)
    run_passes(made, "fuse-attention,weight-rows" if train else "fuse-attention")
    return made


def step_graph(graph: Graph, passes: StepPasses) -> Graph:
    """Return the graph of a step of `graph`, which stays as it is.

    Raises:
      InputError: the mesh or the groups do not suit the graph.
    """
    made = clone(graph)
    run_passes(made, str(passes))
    return made
