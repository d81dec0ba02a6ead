"""Layouts: which mesh axes split the batch, the experts, the neurons and the parameters.

They are those of the rules by which ``annotate-sharding`` lays a graph: rules that the user names,
or those that the axes of the mesh stand for.  The paper's layout has the experts on the rows of
data and splits heads and neurons over ``model`` (ST-MoE, appendix H); ``fsdp`` splits parameters
too and gathers them where they are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from moecc.errors import InputError, Problem
from moecc.ir.mesh import Mesh, nearest_divisor
from moecc.plan.workload import Workload
from moecc.sharding.rules import LayoutRule, read_layouts

DENSE_WEIGHTS = ("whole", "split")
"""Whether parameters that are no experts' lie whole or split along the experts' axes."""

TENSOR_AXES = ("q", "kv", "head", "kv_head", "mlp", "vocab")
"""The axes of values that tensor parallelism splits."""

KNOWN = frozenset({"batch", "group", "expert", *TENSOR_AXES})
"""The axes of values that a layout of a plan may split."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
      mesh: the mesh.
      experts: how many experts a layer has, 0 in a dense model.
      dense_weights: one of `DENSE_WEIGHTS`.
      replicated: whether all devices of the experts' axes have the same tokens.
      own: the names or files of the rules; empty: those that the mesh's axes stand for.
    """

    mesh: Mesh
    experts: int = 0
    dense_weights: str = "whole"
    replicated: bool = False
    own: tuple[str, ...] = ()

    @classmethod
    def ruled(cls, mesh: Mesh, experts: int, rules: tuple[str, ...]) -> Layout:
        """Return the layout of rules that the user names.

        Raises:
          UsageError: there is no such layout.
          InputError: a file cannot be read, or splits an axis that a plan does not know.
        """
        found = cls(mesh, experts, own=rules)
        unknown = [r for r in found.rules if not r.stored and r.axis not in KNOWN]
        if unknown:
            raise InputError(
                Problem(
                    f"the plan does not know what it costs to split the axis {rule.axis!r}",
                    rule.source,
                    ", ".join(sorted(KNOWN)),
                    str(rule),
                )
                for rule in unknown
            )
        apart = not set(found.expert_axes) <= set(found.batch_axes)
        return cls(mesh, experts, "whole", apart, rules)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the rules, those that count most in front.

        ``fsdp`` comes first, so that the batch lies on the experts' axis innermost and rows reach
        their experts by one exchange.

        Raises:
          InputError: tokens are to be the same along the axis of data.
        """
        if self.own:
            return self.own
        names = [n for n in ("fsdp",) if n in self.mesh.names]
        names += self._rows()
        if "model" in self.mesh.names and "st-moe" not in names:
            names.append("tensor-parallel")
        if self.dense_weights == "split":
            apart = self.experts and "expert" in self.mesh.names
            names.append("zero-expert" if apart else "zero")
        return tuple(names)

    def _rows(self) -> list[str]:
        """Return what says where the batch lies besides, and the experts."""
        sizes = dict(self.mesh.axes)
        if self.experts and "expert" in sizes:
            return ["expert-replicated" if self.replicated else "expert-parallel"]
        data = sizes.get("data", 1)
        if self.experts and data > 1 and self.experts % data == 0:
            if self.replicated:
                raise InputError(
                    "the rows of data cannot all have the same tokens",
                    where=f"mesh {self.mesh}",
                    hint="experts on an axis of their own: expert=8",
                )
            return ["st-moe"]
        return ["data-parallel"] if "data" in sizes else []

    @cached_property
    def rules(self) -> tuple[LayoutRule, ...]:
        """The rules, those that count most in front."""
        return tuple(read_layouts(self.names))

    def _on(self, axes: Iterable[str], *, stored: bool = False) -> tuple[str, ...]:
        """Return the mesh axes on which any of `axes` lies, in the order of the mesh."""
        wanted = set(axes)
        found = {m for r in self.rules if r.stored is stored and r.axis in wanted for m in r.mesh}
        return tuple(n for n in self.mesh.names if n in found)

    @cached_property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the experts."""
        return self._on(("expert",)) if self.experts else ()

    @cached_property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the batch."""
        return self._on(("batch",))

    @cached_property
    def tensor_axes(self) -> tuple[str, ...]:
        """The mesh axes that split heads, neurons and the vocabulary."""
        return self._on(TENSOR_AXES)

    def stored_parts(
        self, sizes: Mapping[str, float], taken: Collection[str]
    ) -> dict[str, tuple[str, ...]]:
        """Return for the axes of a parameter the mesh axes that cut them for storage.

        Vectors are small, and lie whole.

        Args:
          sizes: of its axes on one device, where it is used.
          taken: the mesh axes that it lies on there.
        """
        left, busy = dict(sizes), set(taken)
        found: dict[str, tuple[str, ...]] = {}
        for rule in self.rules if len(sizes) > 1 else ():
            if not rule.stored or rule.axis not in left:
                continue
            for name in rule.mesh:
                parts = self.mesh.size((name,)) if name in self.mesh.names else 0
                if not parts or name in busy or left[rule.axis] % parts:
                    continue
                left[rule.axis] /= parts
                busy.add(name)
                found[rule.axis] = (*found.get(rule.axis, ()), name)
        return found

    def gradient_axes(self, of_experts: bool, stored: Collection[str]) -> tuple[str, ...]:
        """Return the axes over which a gradient is summed, each device having all.

        Args:
          of_experts: whether the parameter has a part for each expert.
          stored: the mesh axes that cut it for storage, over which it is scattered.
        """
        own = (*stored, *(self.expert_axes if of_experts else ()))
        return tuple(n for n in self.batch_axes if n not in own)

    @cached_property
    def shards(self) -> dict[str, int]:
        """In how many parts each axis of a value lies."""
        batch, experts = self.mesh.size(self.batch_axes), self.mesh.size(self.expert_axes)
        rows = self.mesh.size({*self.batch_axes, *self.expert_axes})
        return {
            **{name: self.mesh.size(self._on((name,))) for name in TENSOR_AXES},
            "batch": batch,
            "expert": experts,
            "slot": rows // experts,
        }

    @cached_property
    def row_shards(self) -> int:
        """Over how many devices the rows of experts are spread, neurons aside."""
        return self.shards["expert"] * self.shards["slot"]

    @cached_property
    def used(self) -> frozenset[str]:
        """The mesh axes that anything lies on."""
        stored = {m for r in self.rules if r.stored for m in r.mesh}
        return frozenset((*self.batch_axes, *self.expert_axes, *self.tensor_axes, *stored))


def layouts(mesh: Mesh, work: Workload) -> Iterator[Layout]:
    """Yield the layouts of `work` that the names of the mesh's axes stand for."""
    apart = bool(work.experts) and "expert" in mesh.names
    for dense, replicated in product(DENSE_WEIGHTS, (False, True) if apart else (False,)):
        layout = Layout(mesh, work.experts, dense, replicated)
        if dense == "split" and not (apart or "data" in mesh.names):
            continue
        if not any(problems(layout, work)):
            yield layout


def problems(layout: Layout, work: Workload) -> Iterator[Problem]:
    """Yield why `work` cannot be laid out so: which axis, which size, the nearest that would."""
    where = f"mesh {layout.mesh}"
    batch = layout.shards["batch"]
    if work.batch.sequences % batch:
        yield Problem(
            f"{' x '.join(layout.batch_axes)} does not divide the batch",
            where,
            f"a divisor of {work.batch.sequences} sequences",
            str(batch),
            f"{nearest_divisor(work.batch.sequences, batch)} would",
        )
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
    for name, size in layout.mesh.axes:
        if size > 1 and name not in layout.used:
            dense = name == "expert" and not work.experts
            yield Problem(
                "the mesh has an axis expert, and the model has no experts" if dense
                else f"nothing lies on the mesh axis {name!r}",
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


def check_layout(layout: Layout, work: Workload) -> None:
    """Check that every axis divides what it splits.

    Raises:
      InputError: with every axis that does not.
    """
    found = list(problems(layout, work))
    if found:
        raise InputError(found)
