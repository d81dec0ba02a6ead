"""The ways of rows to their experts and back: which collectives, on which values of a layer.

The pass ``expert-parallel`` writes them into a graph, and a plan prices them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moecc.ir.types import TensorType
from moecc.sharding.collectives import Step, steps

EXCHANGES = ("capacity", "ragged", "hierarchical")
"""The ways on which rows are exchanged; on ``ring`` and ``replicated`` tokens are gathered."""


@dataclass(frozen=True)
class Slice:
    """Rows of which devices that are copies of one another each send a part.

    Attributes:
      axis: the axis along which a row is cut.
      mesh: the mesh axis along which devices are copies of one another.
    """

    axis: str
    mesh: str

    @property
    def shard(self) -> Step:
        """What takes a device's part of a row."""
        return "shard", {"axis": self.axis, "mesh": (self.mesh,)}

    @property
    def gather(self) -> Step:
        """What puts the parts together."""
        return "all_gather", {"axis": self.axis, "mesh": (self.mesh,)}

    def of(self, type: TensorType) -> TensorType:
        """Return `type`, no sum any more, with its axis sharded."""
        return moved(type, {self.axis: (self.mesh,)})


def to_experts(rows: TensorType, target: TensorType, part: Slice | None) -> Iterator[Step]:
    """Yield what brings rows, as they were dispatched, to their experts."""
    yield from steps(rows, target if part is None else part.of(target))
    if part is not None:
        yield part.gather


def from_experts(made: TensorType, target: TensorType, part: Slice | None) -> Iterator[Step]:
    """Yield what brings rows that experts made back to their tokens, in parts if they were cut."""
    yield from steps(made, target if part is None else part.of(target))


def gathered(type: TensorType, over: Sequence[str]) -> Iterator[Step]:
    """Yield what makes a value whole along the mesh axes `over`."""
    for axis in type.axes:
        mesh = tuple(m for m in axis.mesh if m in over)
        if mesh:
            yield "all_gather", {"axis": axis.name, "mesh": mesh}


def sums_back(source: TensorType, target: TensorType, via: str) -> Iterator[Step]:
    """Yield what makes tokens of what the experts of each device add to them.

    A ring scatters the sums; ``replicated`` carries them out everywhere first.
    """
    if via == "ring":
        yield from steps(source, target)
        return
    whole = TensorType(source.dtype, source.axes)
    yield from steps(source, whole)
    yield from steps(whole, target)


def without(type: TensorType, over: Sequence[str]) -> TensorType:
    """Return `type`, whole along the mesh axes `over`."""
    axes = (replace(a, mesh=tuple(m for m in a.mesh if m not in over)) for a in type.axes)
    return type.with_axes(axes)


def moved(type: TensorType, spec: dict[str, tuple[str, ...]]) -> TensorType:
    """Return `type`, no sum any more, with the axes of `spec` sharded so."""
    axes = (replace(a, mesh=spec.get(a.name, a.mesh)) for a in type.axes)
    return TensorType(type.dtype, tuple(axes))
