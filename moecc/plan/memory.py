"""Memory of one device, by kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from moecc.analysis import CHUNK_BYTES, chunk_count
from moecc.plan.networks import padded, stacked
from moecc.plan.parts import Layer, Shape, Weight
from moecc.plan.sharding import Sharding, Values
from moecc.plan.step import StepConfig, Strategy
from moecc.plan.workload import Workload

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
class Memory:
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
    gaps: float = 0.0

    @property
    def arguments(self) -> float:
        """What a step is given."""
        return self.parameters + self.optimizer + self.inputs

    @property
    def state(self) -> float:
        """What a training step returns in the place of what it is given."""
        return self.parameters + self.optimizer

    @property
    def temporaries(self) -> float:
        """What a step needs beside what it is given, at the worst moment."""
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
) -> Memory:
    """Return the memory of one device.

    Args:
      work: the model and its micro-batch.
      config: the settings of the step.
      strategy: what is chosen.
      local: sizes on one device, with the rows that there is room for.
      kind: of the machine.
    """
    stored, of_layers, trained = _stored(work, local, kind)
    width, wide = config.compute_type.itemsize_bytes, config.weight_type.itemsize_bytes
    training = config.train
    head, head_gradient = _head(work, local, config)
    return Memory(
        parameters=stored * wide,
        gradients=trained * _gradient_width(config),
        copies=of_layers * width if width < wide and not training else 0.0,
        optimizer=optimizer_bytes(work, config, local, kind) if training else 0.0,
        activations=_kept(work, local.values, strategy) * width if training else 0.0,
        buffers=_zeros(work, local, kind) * width
        + max(
            _layer_bytes(work, local, config, strategy.remat, kind) + head_gradient,
            # Gradients of layers come when the logits have gone.
            head - (trained * width if training else 0.0),
        ),
        inputs=_inputs(work, config) / strategy.layout.shards["batch"],
        gaps=_gaps(work, config, strategy, kind),
    )


def _inputs(work: Workload, config: StepConfig) -> float:
    """Return the bytes of tokens and features, and in training of targets, of all micro-batches."""
    tokens = 4.0 * work.batch.tokens * (bool(work.batch.lengths) + config.train)
    features = sum(shape.elements for shape in work.features) * config.compute_type.itemsize_bytes
    return (tokens + features) * config.micro_batches


def _gaps(work: Workload, config: StepConfig, strategy: Strategy, kind: str) -> float:
    """Return the share of the temporaries that is lost between them."""
    has_stacks = len({layer.name for layer in work.layers}) > 1
    again = config.train and strategy.remat != "none"
    return (STACKS_GAPS if has_stacks and again else GAPS).get(kind, 0.0)


def _gradient_width(config: StepConfig) -> int:
    """Return the bytes of gradients for each entry of a parameter."""
    if not config.train:
        return 0
    width, reduced = config.compute_type.itemsize_bytes, config.reduce_type.itemsize_bytes
    # Those of a micro-batch are there until they are added to the sum.
    return width + reduced if config.micro_batches > 1 else max(width, reduced)


def _stored(work: Workload, local: Sharding, kind: str) -> tuple[float, float, float]:
    """Return the entries of all parameters on a device, of those of layers, of the trained."""

    def total(weights: Iterable[tuple[Weight, int]]) -> float:
        return sum(padded(stacked(local.stored_sizes(w).values(), n), kind) for w, n in weights)

    known = local.sharded
    every = known.once(("stored", kind), lambda: total(work.weights))
    layers = ((w, part.count) for part in work.parts if part.in_layer for w in part.weights)
    of_layers = known.once(("stored in layers", kind), lambda: total(layers))
    free = tuple((w, n) for w, n in work.weights if w.trained)
    all_free = len(free) == len(work.weights)
    return (
        every,
        of_layers,
        every if all_free else known.once(("trained", kind), lambda: total(free)),
    )


def optimizer_bytes(work: Workload, config: StepConfig, local: Sharding, kind: str) -> float:
    """Return the bytes of the optimizer's state on one device of a machine of `kind`."""
    key = ("optimizer", config.optimizer, kind)
    return local.sharded.once(
        key, lambda: sum(_state(w, n, local, config, kind) for w, n in work.weights if w.trained)
    )


def _state(weight: Weight, count: int, local: Sharding, config: StepConfig, kind: str) -> float:
    """Return the bytes of the optimizer's state of `count` equal parameters, in their type.

    AdamW keeps two moments.  Adafactor keeps, of the second, means over one of the two largest axes
    and over the other (Shazeer and Stern 2018), and here no first.
    """
    stored, wide = local.stored_sizes(weight), config.weight_type.itemsize_bytes
    if config.optimizer == "adamw":
        return 2.0 * wide * padded(stacked(stored.values(), count), kind)
    sizes = sorted(((size, name) for name, size in weight.shape), reverse=True)
    if len(sizes) < 2 or sizes[1][0] < FACTORED_LEAST:
        return wide * padded(stacked(stored.values(), count), kind)
    kept = ([size for n, size in stored.items() if n != name] for _, name in sizes[:2])
    return sum(wide * padded(stacked(axes, count), kind) for axes in kept)


def _kept(work: Workload, values: Values, strategy: Strategy) -> float:
    """Return the elements that the backward pass keeps of all layers."""
    axis = strategy.stream_axis
    streams = strategy.layout.size((axis,)) if axis is not None else 1
    key = ("kept", strategy.remat, strategy.in_rounds, streams)
    return values.once(key, lambda: _kept_of(work.layers, values, strategy, streams))


def _kept_of(layers: Iterable[Layer], values: Values, strategy: Strategy, streams: int) -> float:
    total, remat = 0.0, strategy.remat
    for layer in layers:
        shapes = _kept_shapes(layer, remat)
        # Of rows, rounds of an exchange keep nothing.
        shapes = (s for s in shapes if not (strategy.in_rounds and s.has_slots))
        kept = sum(map(values.elements, shapes))
        if remat != "none" and layer.is_first:
            kept += sum(map(values.elements, layer.inputs)) / streams
        total += layer.count * kept
    return total


def _kept_shapes(layer: Layer, remat: str) -> Iterator[Shape]:
    """Yield what is kept of a layer beside the input of its unit."""
    if remat == "none":
        yield from layer.residuals.kept
    if remat == "save":
        yield from layer.residuals.named


def _layer_bytes(
    work: Workload, local: Sharding, config: StepConfig, remat: str, kind: str
) -> float:
    """Return the most that is alive while a layer is computed, and its gathered parameters."""
    width = config.compute_type.itemsize_bytes
    # Values that a forward pass holds at a time are as many as gradients that a backward pass does.
    again, whole = config.train and remat != "none", remat == "block"
    fuses = kind == "tpu"
    values = local.values
    layers = values.once(
        ("layers", again, whole, fuses),
        lambda: max((_layer(x, values, again, whole, fuses) for x in work.layers), default=0.0),
    )
    gathered = local.sharded.once(
        "gathered", lambda: max((_gathered(p.weights, local) for p in work.parts), default=0.0)
    )
    return (layers + gathered) * width


def _layer(layer: Layer, values: Values, again: bool, whole: bool, fuses: bool) -> float:
    """Return the most elements alive while the backward pass goes through a layer.

    Computed `again`, its residuals are there; they go as they are used, while the
    gradients of its values come and go.  Where its block is computed as a `whole`, those of earlier
    layers of a loop are there, too.
    """
    backward = layer.residuals.fused if fuses else layer.residuals.plain
    beside = layer.block_beside if whole else layer.beside
    there = (*backward.alive, *beside[fuses])
    now = most = sum(map(values.elements, there)) if again else 0.0
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
        return 4.0 * max(map(local.elements, work.logits), default=0.0), 0.0
    logits, used = 4.0 * local.elements(head.logits), sum(map(local.used, head.weights))
    count = chunk_count(logits, 4.0 * used, CHUNK_BYTES) if head.is_cut else 1
    width = config.compute_type.itemsize_bytes
    free = [w for w in head.weights if w.trained]
    made = sum(map(local.used, free))
    whole = (4 if count > 1 else width) * made - width * sum(map(local.stored, free))
    if count > 1:
        return 4.0 * made + CHUNK_PARTS * logits / count, whole
    beside = width * _gathered(head.weights, local) + whole
    return max(logits, logits * width / 4 + beside), whole
