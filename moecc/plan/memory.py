"""Memory of one device, by kind; sizes of values and parameters under a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import TypeVar, cast

from moecc.analysis import CHUNK_BYTES, chunk_count
from moecc.ir.graph import Node, Value
from moecc.plan.machines import PACKED_ROWS, padded
from moecc.plan.parts import GlobalShape, PlannedLayer, Weight
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.collectives import Gradients, GradientSum
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import Propagation
from moecc.types import TensorType

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Memo:
    """A cache of results that many strategies share."""

    _results: dict[object, object] = field(default_factory=dict, repr=False, kw_only=True)

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """Return the result of `compute` from when `key` was first asked for."""
        if key not in self._results:
            self._results[key] = compute()
        return cast(T, self._results[key])


@dataclass(frozen=True, eq=False)
class Values(Memo):
    """Sizes of values on one device, shared by layouts that differ in stored parameters alone.

    Attributes:
      layout: the layout.
      work: the model.
      rows: the rows of experts, as a multiple of those in the graph.
    """

    layout: Layout
    work: Workload
    rows: float = 1.0

    def elements(self, shape: GlobalShape) -> float:
        """Return the elements on one device of a value that is looked at by itself."""
        size = self._results.get(shape)
        if size is None:
            rows = self.rows if shape.has_slots else 1.0
            shards = self.layout.shards_of(self.work.sample.alone(shape, self.layout))
            size = self._results[shape] = shape.elements / shards * rows
        return cast(float, size)


@dataclass(frozen=True, eq=False)
class Sharded(Memo):
    """One layer of each kind under a layout.

    Attributes:
      layout: the layout.
      work: the model.
    """

    layout: Layout
    work: Workload

    @cached_property
    def _shard(self) -> tuple[Propagation, Gradients]:
        return self.work.sample.shard(self.layout)

    @property
    def propagation(self) -> Propagation:
        """The shardings of the values."""
        return self._shard[0]

    @cached_property
    def gradient_sums(self) -> dict[Node, list[GradientSum]]:
        """The sums of gradients of values, by the node that differs from device to device."""
        sums: dict[Node, list[GradientSum]] = {}
        for each in self._shard[1].values:
            sums.setdefault(each.site.node, []).append(each)
        return sums

    def value(self, weight: Weight) -> Value:
        """Return the parameter of the sample that is `weight`, or one of its kind."""
        value = self.work.params.get(weight.name)
        return value or self.work.params_by_kind[weight.shape, weight.of_experts]

    def used(self, weight: Weight) -> TensorType:
        """Return the type of a parameter where it is used: sharded over experts and neurons."""
        return self.propagation.wanted[self.value(weight)]

    def stored(self, weight: Weight) -> TensorType:
        """Return the type of a parameter as it is stored."""
        return self.propagation.types[self.value(weight)]

    def is_odd(self, weight: Weight) -> bool:
        """Return whether a parameter is gathered for use from shards with odd numbers of rows."""
        used = {m for a in self.used(weight) for m in a.mesh}
        pairs = zip(weight.shape, self.stored(weight), strict=True)
        shards = (s / self.layout.size(a.mesh) for (_, s), a in pairs if set(a.mesh) - used)
        return any(size % PACKED_ROWS for size in shards)

    def summed(self, weight: Weight) -> set[str]:
        """Return the mesh axes over which the gradient of a parameter is summed."""
        return self._shard[1].params.get(self.value(weight), set())


@dataclass(frozen=True, eq=False)
class Sharding:
    """Sizes under a layout.

    Attributes:
      sharded: the layers under the layout.
      values: the sizes of values.
    """

    sharded: Sharded
    values: Values

    @classmethod
    def of(cls, layout: Layout, work: Workload) -> Sharding:
        """Return the sizes of `work` under `layout`, with the rows of the graph."""
        return cls(Sharded(layout, work), Values(layout.of_values, work))

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.sharded.layout

    def used(self, weight: Weight) -> float:
        """Return the elements of a parameter where it is used."""
        return weight.shape.elements / self.layout.shards_of(self.sharded.used(weight))

    def stored(self, weight: Weight) -> float:
        """Return the elements of a parameter as it is stored."""
        return prod(self.stored_sizes(weight).values())

    def stored_sizes(self, weight: Weight) -> dict[str, float]:
        """Return the sizes of a parameter as it is stored, by axis."""

        def sizes() -> dict[str, float]:
            pairs = zip(weight.shape, self.sharded.stored(weight), strict=True)
            return {name: size / self.layout.size(axis.mesh) for (name, size), axis in pairs}

        return self.sharded.once(("stored", weight.shape, weight.of_experts), sizes)


FACTORED_LEAST = 128
"""Adafactor keeps rows and columns of matrices whose two largest axes have at least so many
entries, and all entries of smaller ones (optax: ``min_dim_size_to_factor``)."""


GAPS = {"tpu": 0.35}
"""What the compiler's heap loses between temporaries, as a share of those that are alive at a time,
by kind of machine: the middle of what `benchmarks/plan_vs_xla.py` finds, 15 % to 58 %."""

STACKS_GAPS = {"tpu": 0.85}
"""The same where several stacks of layers, as of encoder and decoder, are computed again for the
gradient: 82 % to 96 % in the five programs that were compiled, whatever the optimiser (one whose
blocks are computed again as a whole has 123 %)."""


CHUNK_PARTS = 3
"""Arrays of the size of the logits of a chunk: these, their exponentials and their gradient."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device.

    Attributes:
      parameters: the parameters.
      gradients: their gradients, in the type of the computation, and the sums of them over
        micro-batches, or those in a wider type that are reduced.
      copies: of a forward pass the parameters of layers in the type of the computation, where they
        are wider; a training step casts a layer at a time.
      optimizer: what the optimizer keeps.
      activations: what the backward pass keeps.
      buffers: what lives for a moment: a layer being computed, gathered parameters, logits.
      inputs: the tokens.
      gaps: the share of the temporaries that is lost between them.
    """

    parameters: float
    gradients: float
    copies: float
    optimizer: float
    activations: float
    buffers: float
    inputs: float
    gaps: float

    @property
    def arguments(self) -> float:
        """The arguments of a step."""
        return self.parameters + self.optimizer + self.inputs

    @property
    def state(self) -> float:
        """The arguments that a training step returns with new values."""
        return self.parameters + self.optimizer

    @property
    def temporaries(self) -> float:
        """The memory that a step needs beside its arguments, at the worst moment."""
        return self.gradients + self.copies + self.activations + self.buffers

    @property
    def heap(self) -> float:
        """The temporaries and what is lost between them: what a compiler calls temporaries."""
        return self.temporaries * (1 + self.gaps)

    @property
    def total(self) -> float:
        """All of it, at the worst moment; results take the place of arguments."""
        return self.arguments + self.temporaries

    def kinds(self) -> dict[str, float]:
        """Return the bytes by kind."""
        return {name: size for name, size in asdict(self).items() if name != "gaps"}


def memory(
    work: Workload, config: StepConfig, strategy: Strategy, local: Sharding, kind: str
) -> StepMemory:
    """Return the memory of one device.

    Args:
      work: the model and its micro-batch.
      config: the settings of the step.
      strategy: the choices of the plan.
      local: sizes on one device, with the rows that there is room for.
      kind: of the machine.
    """
    sharded, train = local.sharded, config.train
    width, wide = config.compute_type.itemsize_bytes, config.weight_type.itemsize_bytes

    def stored(weights: Iterable[tuple[Weight, int]]) -> float:
        return sum(padded((n, *local.stored_sizes(w).values()), kind) for w, n in weights)

    every = sharded.once(("stored", kind), lambda: stored(work.weights))
    in_layers = ((w, part.count) for part in work.parts if part.in_layer for w in part.weights)
    of_layers = sharded.once(("stored in layers", kind), lambda: stored(in_layers))
    free = [(w, n) for w, n in work.weights if w.trained]
    all_free = len(free) == len(work.weights)
    trained = every if all_free else sharded.once(("trained", kind), lambda: stored(free))

    reduced = config.reduce_type.itemsize_bytes
    # Gradients of a micro-batch are there until they are added to the sum.
    gradient_width = width + reduced if config.micro_batches > 1 else max(width, reduced)

    tokens = 4.0 * work.batch.tokens * (bool(work.batch.lengths) + train)
    features = sum(shape.elements for shape in work.features) * width
    batch = (tokens + features) * config.micro_batches

    again = train and strategy.remat != "none"
    has_stacks = len({layer.name for layer in work.layers}) > 1
    head, head_gradient = _head(work, local, config)
    return StepMemory(
        parameters=every * wide,
        gradients=trained * gradient_width if train else 0.0,
        copies=of_layers * width if width < wide and not train else 0.0,
        optimizer=optimizer_bytes(work, config, local, kind) if train else 0.0,
        activations=_activations(work, local.values, strategy) * width if train else 0.0,
        buffers=_zeros(work, local, kind) * width
        + max(
            _layer_elements(work, local, again, strategy.remat == "block", kind) * width
            + head_gradient,
            # Gradients of layers come when the logits have gone.
            head - (trained * width if train else 0.0),
        ),
        inputs=batch / strategy.layout.shards["batch"],
        gaps=(STACKS_GAPS if has_stacks and again else GAPS).get(kind, 0.0),
    )


def optimizer_bytes(work: Workload, config: StepConfig, local: Sharding, kind: str) -> float:
    """Return the bytes of the optimizer's state on one device of a machine of `kind`.

    AdamW keeps two moments.  Adafactor keeps, of the second, means over one of the two largest axes
    and over the other (Shazeer and Stern 2018), and here no first.
    """
    wide = config.weight_type.itemsize_bytes

    def state(weight: Weight, count: int) -> float:
        stored = local.stored_sizes(weight)
        largest = sorted(((size, name) for name, size in weight.shape), reverse=True)[:2]
        all_sizes, copies = [list(stored.values())], 1.0
        if config.optimizer == "adamw":
            copies = 2.0
        elif len(largest) == 2 and largest[1][0] >= FACTORED_LEAST:
            all_sizes = [[size for n, size in stored.items() if n != name] for _, name in largest]
        return sum(copies * wide * padded((count, *sizes), kind) for sizes in all_sizes)

    return local.sharded.once(
        ("optimizer", config.optimizer, kind),
        lambda: sum(state(w, n) for w, n in work.weights if w.trained),
    )


def _activations(work: Workload, values: Values, strategy: Strategy) -> float:
    """Return the elements that the backward pass keeps of all layers."""
    axis, remat = strategy.stream_axis, strategy.remat
    streams = strategy.layout.size((axis,)) if axis is not None else 1

    def elements() -> float:
        total = 0.0
        for layer in work.layers:
            residuals = layer.residuals
            shapes = {"none": residuals.saved, "save": residuals.named}.get(remat, ())
            # Of rows, rounds of an exchange keep nothing.
            saved = sum(
                values.elements(s) for s in shapes if not (strategy.in_rounds and s.has_slots)
            )
            if remat != "none" and layer.is_first:
                saved += sum(map(values.elements, layer.inputs)) / streams
            total += layer.count * saved
        return total

    return values.once(("kept", remat, strategy.in_rounds, streams), elements)


def _layer_elements(
    work: Workload, local: Sharding, again: bool, in_blocks: bool, kind: str
) -> float:
    """Return the most that is alive while a layer is computed, and its gathered parameters.

    Args:
      work: the model.
      local: sizes on one device.
      again: whether its residuals are there because it is recomputed.
      in_blocks: whether its block is recomputed at once.
      kind: of the machine.
    """
    # Values that a forward pass holds at a time are as many as gradients that a backward pass does.
    values, fuses = local.values, kind == "tpu"
    layers = values.once(
        ("layers", again, in_blocks, fuses),
        lambda: max((_alive(x, values, again, in_blocks, fuses) for x in work.layers), default=0.0),
    )
    gathered = local.sharded.once(
        "gathered", lambda: max((_gathered(p.weights, local) for p in work.parts), default=0.0)
    )
    return layers + gathered


def _alive(layer: PlannedLayer, values: Values, again: bool, in_blocks: bool, fuses: bool) -> float:
    """Return the most elements alive while the backward pass goes through a layer.

    Recomputed, its residuals go as they are used, while the gradients of its values come and go.
    Where its block is recomputed at once, those of earlier layers of a loop are there, too.
    """
    backward = layer.residuals.fused if fuses else layer.residuals.plain
    beside = layer.block_beside if in_blocks else layer.beside
    now = sum(map(values.elements, (*backward.alive, *beside[fuses]))) if again else 0.0
    most = now
    for step in backward.flow:
        born, done = (sum(map(values.elements, s)) for s in (step.born, step.done))
        now += born
        most = max(most, now - min(born, done) if step.in_place else now)
        now -= done
        if again:
            now -= sum(map(values.elements, step.freed))
    return most


def _gathered(weights: tuple[Weight, ...], local: Sharding) -> float:
    """Return the elements of a part's parameters that are put together to be used."""
    return sum(local.used(w) - local.stored(w) for w in weights)


def _zeros(work: Workload, local: Sharding, kind: str) -> float:
    """Return the elements that a TPU adds shards to where it gathers by a sum, of the largest."""

    def most() -> float:
        odd = (w for w, _ in work.weights if local.sharded.is_odd(w))
        return max(map(local.used, odd), default=0.0)

    return local.sharded.once("zeros", most) if kind == "tpu" else 0.0


def _head(work: Workload, local: Sharding, config: StepConfig) -> tuple[float, float]:
    """Return what is alive while the head is computed, and what its gradient takes beyond its own.

    The first are logits in float32, all or a chunk of them.  The weights were gathered by then, and
    their gradient is made from the logits.  Chunks add up the gradients of the weights, in float32.

    The second is what the gradient of the weights takes beyond its local shard: it is made first,
    and compilers reduce it last, so that it is whole while layers are computed.
    """
    head = work.head
    if head is None or not config.train:
        return 4.0 * max(map(local.values.elements, work.logits), default=0.0), 0.0
    logits, used = 4.0 * local.values.elements(head.logits), sum(map(local.used, head.weights))
    count = chunk_count(logits, 4.0 * used, CHUNK_BYTES) if head.is_cut else 1
    width = config.compute_type.itemsize_bytes
    free = [w for w in head.weights if w.trained]
    gradients = sum(map(local.used, free))
    unreduced = (4 if count > 1 else width) * gradients - width * sum(map(local.stored, free))
    if count > 1:
        return 4.0 * gradients + CHUNK_PARTS * logits / count, unreduced
    beside = width * _gathered(head.weights, local) + unreduced
    return max(logits, logits * width / 4 + beside), unreduced
