"""Layouts: which mesh axes split the batch, the experts, the neurons and the parameters.

The paper's layout has the experts on the rows of data and splits heads and neurons over ``model``
(ST-MoE, appendix H); ``fsdp`` splits parameters too and gathers them where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from moecc.errors import InputError, Problem
from moecc.ir.mesh import Mesh, nearest_divisor
from moecc.plan.workload import Workload

DENSE_WEIGHTS = ("whole", "split")
"""Whether parameters that are no experts' lie whole or split along the experts' axes."""

TENSOR_AXES = ("q", "kv", "head", "kv_head", "mlp", "vocab")
"""The axes of values that ``model`` splits."""


STORED_AXES = ("embed", "vocab", "mlp", "q", "kv")
"""The axes of parameters that are cut for storage: the first of them that divides."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
      mesh: the mesh.
      experts: how many experts a layer has, 0 in a dense model.
      dense_weights: one of `DENSE_WEIGHTS`.
      replicated: whether all devices of the experts' axes have the same tokens.
    """

    mesh: Mesh
    experts: int = 0
    dense_weights: str = "whole"
    replicated: bool = False

    @cached_property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the experts."""
        sizes = dict(self.mesh.axes)
        if not self.experts:
            return ()
        if "expert" in sizes:
            return ("expert",)
        data = sizes.get("data", 1)
        return ("data",) if data > 1 and self.experts % data == 0 else ()

    @cached_property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the batch."""
        names = [n for n in self.mesh.names if n != "model"]
        return tuple(n for n in names if not (self.replicated and n in self.expert_axes))

    @cached_property
    def tensor_axes(self) -> tuple[str, ...]:
        """The mesh axes that split heads, neurons and the vocabulary."""
        return tuple(n for n in self.mesh.names if n == "model")

    def weight_axes(self, of_experts: bool) -> tuple[str, ...]:
        """Return the axes that parameters are split over beside, and gathered from at use."""
        return self._weight_axes[of_experts]

    @cached_property
    def _weight_axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._split_weights(False), self._split_weights(True)

    def _split_weights(self, of_experts: bool) -> tuple[str, ...]:
        split = [n for n in self.mesh.names if n == "fsdp"]
        # Experts that lie whole are stored as other weights are.
        if self.dense_weights == "split" and not (of_experts and self.expert_axes):
            # Without experts on it the axis of data serves as well.
            split += [n for n in self.expert_axes or ("data",) if n not in split]
        return tuple(n for n in self.mesh.names if n in split)

    def gradient_axes(self, of_experts: bool) -> tuple[str, ...]:
        """Return the axes over which gradients of parameters are summed, each device having all."""
        own = (*self.weight_axes(of_experts), *(self.expert_axes if of_experts else ()))
        return tuple(n for n in self.batch_axes if n not in own)

    @cached_property
    def shards(self) -> dict[str, int]:
        """In how many parts each axis of a value lies."""
        tensor = self.mesh.size(self.tensor_axes)
        batch, experts = self.mesh.size(self.batch_axes), self.mesh.size(self.expert_axes)
        rows = self.mesh.size({*self.batch_axes, *self.expert_axes})
        return {
            **dict.fromkeys(TENSOR_AXES, tensor),
            "batch": batch,
            "expert": experts,
            "slot": rows // experts,
        }

    @cached_property
    def row_shards(self) -> int:
        """Over how many devices the rows of experts are spread, neurons aside."""
        return self.shards["expert"] * self.shards["slot"]


def problems(layout: Layout, work: Workload) -> Iterator[Problem]:
    """Yield why `work` cannot be laid out so: which axis, which size, the nearest that would."""
    where = f"mesh {layout.mesh}"
    tensor, batch = layout.mesh.size(layout.tensor_axes), layout.shards["batch"]
    if work.batch.sequences % batch:
        yield Problem(
            f"{' x '.join(layout.batch_axes)} does not divide the batch",
            where,
            f"a divisor of {work.batch.sequences} sequences",
            str(batch),
            f"{nearest_divisor(work.batch.sequences, batch)} would",
        )
    for name, size in work.tensor_sizes.items():
        if size % tensor:
            yield Problem(
                f"model does not divide the axis {name}",
                where,
                f"a divisor of {size}",
                str(tensor),
                f"{nearest_divisor(size, tensor)} would",
            )
    experts = dict(layout.mesh.axes).get("expert", 1)
    if experts > 1 and not work.experts:
        yield Problem("the mesh has an axis expert, and the model has no experts", where)
    elif work.experts and work.experts % experts:
        yield Problem(
            "expert does not divide the experts" if experts < work.experts
            else "more devices for experts than experts",
            where,
            f"a divisor of {work.experts}",
            str(experts),
            f"{nearest_divisor(work.experts, experts)} would",
        )  # fmt: skip


def check_layout(layout: Layout, work: Workload) -> None:
    """Check that every axis divides what it splits.

    Raises:
      InputError: with every axis that does not.
    """
    found = list(problems(layout, work))
    if found:
        raise InputError(found)
