"""Context parallelism: what a step would take if devices had parts of a sequence, keys gathered.

Each of c devices has an equal part of the queries, cut so that causal masks leave all of them the
same work, and gathers the keys and values of the whole sequence for each attention; their gradients
are scattered.  All else is that of c times as many sequences of a c-th of the length.  moecc prices
it and does not lower it: `annotate-sharding` gathers the queries, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecc.errors import InputError
from moecc.ir.mesh import Mesh
from moecc.plan.batches import Batch
from moecc.plan.collectives import seconds
from moecc.plan.estimate import Estimate, Estimator
from moecc.plan.machines import Machine, efficiency
from moecc.plan.parts import Part, Step
from moecc.plan.shapes import Shape
from moecc.plan.strategy import StepConfig, Strategy
from moecc.plan.workload import Workload

KEYS = "kv_seq"


@dataclass(frozen=True)
class InContext:
    """A step whose sequences are in parts.

    Attributes:
      parts: of a sequence.
      estimate: of all but the gathers of keys and values.
      gathered_bytes: of keys and values that a device gathers for one attention.
      gather_seconds: of all gathers and scatters of a step, which are waited for.
    """

    parts: int
    estimate: Estimate
    gathered_bytes: float
    gather_seconds: float

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return self.estimate.seconds + self.gather_seconds

    @property
    def total_bytes(self) -> float:
        """The memory of a device: keys and values of a layer, and their gradients, besides."""
        return self.estimate.memory.total + 2 * self.gathered_bytes


def split_batch(batch: Batch, parts: int) -> Batch:
    """Return a batch of as many tokens, in sequences of a part of the length.

    Raises:
      InputError: sequences do not divide, or are of fixed length.
    """
    if not batch.lengths:
        raise InputError("the model has sequences of fixed length alone")
    for name, size in batch.lengths:
        if size % parts:
            raise InputError(f"sequences of {size} tokens ({name}) are not {parts} equal parts")
    lengths = tuple((name, size // parts) for name, size in batch.lengths)
    return Batch(batch.sequences * parts, lengths)


def whole_keys(work: Workload, parts: int) -> Workload:
    """Return work on parts of sequences whose queries meet the keys of all parts.

    Raises:
      InputError: an attention is not one operation.
    """
    if not any(step.attention for part in work.parts for step in part.steps):
        raise InputError("no attention is one operation, and its gathers cannot be told")
    return replace(work, parts=tuple(_part(part, parts) for part in work.parts))


def _part(part: Part, parts: int) -> Part:
    return replace(part, steps=tuple(_step(step, parts) for step in part.steps))


def _step(step: Step, parts: int) -> Step:
    if step.attention is None:
        return step
    return replace(
        step,
        axes=_longer(step.axes, parts),
        operands=tuple(_longer(shape, parts) for shape in step.operands),
        attention=replace(step.attention, scores=_longer(step.attention.scores, parts)),
    )


def _longer(shape: Shape, parts: int) -> Shape:
    return Shape(tuple((n, size * parts if n == KEYS else size) for n, size in shape))


def in_context(
    work: Workload, machine: Machine, config: StepConfig, strategy: Strategy, parts: int
) -> InContext:
    """Return the cost of a step whose sequences are in parts along an axis of data.

    Args:
      work: of parts of sequences, see `split_batch` and `whole_keys`.
      machine: where.
      config: what is given.
      strategy: what is chosen; the innermost axis of the batch that `parts` divides is split.
      parts: of a sequence.

    Raises:
      InputError: no axis of the batch can be split.
    """
    mesh, axis = _split_mesh(strategy, parts)
    estimator = Estimator(work, machine, config)
    found = estimator.estimate(strategy)
    routes = machine.network.routes(mesh.sizes)
    width, shards = config.dtype.itemsize_bytes, strategy.layout.shards
    most = total = 0.0
    for part in work.parts:
        for step in (s for s in part.steps if s.attention is not None):
            for shape in step.operands[1:3]:
                heads = shards["kv_head"] if "kv_head" in shape.names else shards["head"]
                size = shape.elements / shards["batch"] / heads * width
                most = max(most, size)
                passes = 2 + step.computed_again(strategy.remat) if config.train else 1
                total += part.count * passes * seconds("all_gather", routes[axis,], size)
    return InContext(parts, found, 2 * most, config.micro_batches * total / efficiency("network"))


def _split_mesh(strategy: Strategy, parts: int) -> tuple[Mesh, str]:
    """Return the mesh with an axis of its own for the parts, and its name."""
    layout = strategy.layout
    for name in reversed(layout.batch_axes):
        size = layout.sizes[name]
        if size % parts == 0 and name not in layout.expert_axes:
            axes: list[tuple[str, int]] = []
            for n, s in layout.mesh.axes:
                axes += [(n, s // parts), ("context", parts)] if n == name else [(n, s)]
            return Mesh(tuple(axes)), "context"
    raise InputError(f"no mesh axis of the batch has {parts} devices for a sequence")
