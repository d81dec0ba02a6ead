"""Memory of one device, by kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod

from moecc.plan.shapes import Shape
from moecc.plan.sharding import Sharding
from moecc.plan.strategy import Setting, Strategy
from moecc.plan.workload import Layer, Weight, Workload

FACTORED_LEAST = 128
"""Adafactor keeps rows and columns of matrices whose two largest axes have at least so many
entries, and all entries of smaller ones (optax: ``min_dim_size_to_factor``)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters: the parameters.
      gradients: their gradients.
      optimizer: what the optimizer keeps.
      activations: what the backward pass keeps.
      buffers: what lives for a moment: a layer being computed, gathered parameters, logits.
      inputs: the tokens.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    inputs: float

    @property
    def arguments(self) -> float:
        """What a step is given."""
        return self.parameters + self.optimizer + self.inputs

    @property
    def temporaries(self) -> float:
        """What a step needs beside what it is given."""
        return self.gradients + self.activations + self.buffers

    @property
    def total(self) -> float:
        """All of it, at the worst moment; results take the place of arguments."""
        return self.arguments + self.temporaries

    def kinds(self) -> dict[str, float]:
        """Return the bytes by kind."""
        return asdict(self)


def memory(work: Workload, setting: Setting, strategy: Strategy, local: Sharding) -> Memory:
    """Return the memory of one device.

    Args:
      work: the model and its batch.
      setting: what is given.
      strategy: what is chosen.
      local: sizes on one device, with the rows that there is room for.
    """
    elements = local.once("stored", lambda: sum(n * local.stored(w) for w, n in work.weights))
    stored = elements * setting.weight_dtype.itemsize_bytes
    width = setting.dtype.itemsize_bytes
    training = setting.train
    return Memory(
        parameters=stored,
        gradients=stored if training else 0.0,
        optimizer=optimizer_bytes(work, setting, local) if training else 0.0,
        activations=_kept(work, local, strategy.remat) * width if training else 0.0,
        buffers=max(
            _layer_bytes(work, local, setting, strategy.remat),
            # Gradients of layers come when the logits have gone.
            _logits(work, local, setting) - (stored if training else 0.0),
        ),
        # Tokens, and in training what they should be.
        inputs=4.0 * (1 + training) * work.batch.tokens / strategy.layout.shards["batch"],
    )


def optimizer_bytes(work: Workload, setting: Setting, local: Sharding) -> float:
    """Return the bytes of the optimizer's state on one device."""
    key = ("optimizer", setting.optimizer)
    return local.once(key, lambda: sum(n * _state(w, local, setting) for w, n in work.weights))


def _state(weight: Weight, local: Sharding, setting: Setting) -> float:
    """Return the bytes of the optimizer's state of a parameter, in float32.

    AdamW keeps two moments.  Adafactor keeps, of the second, means over one of the two largest axes
    and over the other (Shazeer and Stern 2018), and here no first.
    """
    if setting.optimizer == "adamw":
        return 8.0 * local.stored(weight)
    sizes = sorted(((size, name) for name, size in weight.shape), reverse=True)
    if len(sizes) < 2 or sizes[1][0] < FACTORED_LEAST:
        return 4.0 * local.stored(weight)
    stored = local.stored_sizes(weight)
    whole = prod(stored.values())
    return sum(4.0 * whole / stored[name] for _, name in sizes[:2])


def _kept(work: Workload, local: Sharding, remat: str) -> float:
    """Return the elements that the backward pass keeps of all layers."""
    return sum(
        layer.count * sum(map(local.elements, _kept_shapes(layer, remat))) for layer in work.layers
    )


def _kept_shapes(layer: Layer, remat: str) -> Iterator[Shape]:
    if remat == "none":
        yield from layer.residuals.kept
        return
    yield from layer.inputs
    if remat == "save":
        yield from layer.residuals.named


def _layer_bytes(work: Workload, local: Sharding, setting: Setting, remat: str) -> float:
    """Return the most that is alive while a layer is computed, and its gathered parameters."""
    width = setting.dtype.itemsize_bytes
    # Values that a forward pass holds at a time are as many as gradients that a backward pass does.
    again = setting.train and remat != "none"
    layers = local.once(
        ("layers", again), lambda: max((_layer(x, local, again) for x in work.layers), default=0.0)
    )
    gathered = local.once(
        "gathered", lambda: max((_gathered(p.weights, local) for p in work.parts), default=0.0)
    )
    return (layers + gathered) * width


def _layer(layer: Layer, local: Sharding, again: bool) -> float:
    """Return the most elements alive while the backward pass goes through a layer.

    Computed `again`, its residuals are there; they go as they are used, while the
    gradients of its values come and go.
    """
    now = most = sum(map(local.elements, layer.residuals.kept)) if again else 0.0
    for step in layer.residuals.flow:
        now += sum(map(local.elements, step.born))
        most = max(most, now)
        now -= sum(map(local.elements, step.done))
        if again:
            now -= sum(map(local.elements, step.freed))
    return most


def _gathered(weights: tuple[Weight, ...], local: Sharding) -> float:
    """Return the elements of a part's parameters that are put together to be used."""
    return sum(local.used(w) - local.stored(w) for w in weights)


def _logits(work: Workload, local: Sharding, setting: Setting) -> float:
    """Return the bytes of the logits: in float32, or in training twice in a narrow type."""
    sizes = map(local.elements, work.logits)
    return max(sizes, default=0.0) * 4.0
