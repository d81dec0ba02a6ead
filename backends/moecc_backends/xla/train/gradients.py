"""Loss and gradients of a batch: micro-batches one after the other, added before devices add.

Everything is a sum: over the tokens of a chunk, the micro-batches, the devices that share a batch.
What a mean is taken over is known of the whole batch beforehand, so that neither micro-batches nor
a mesh change a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.analysis.head import LOGITS, Head, split_head
from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import Mesh
from moecc.ir.routed import MASK
from moecc.steps.totals import totals_of
from moecc.support.text import amount
from moecc.types.dtypes import I32, KEY
from moecc.types.tensor import TensorType
from moecc_backends.xla.lower.function import finalize_output
from moecc_backends.xla.lower.scan import is_cast_by_layer
from moecc_backends.xla.trace.device_view import zeros_like_on_devices
from moecc_backends.xla.trace.masters import Master
from moecc_backends.xla.trace.typed_jax import Function, PyTree, psum
from moecc_backends.xla.trace.values import Named
from moecc_backends.xla.train.loss import IGNORED, TARGETS, HeadLoss, LoweringConfig

Arrays = Mapping[str, jax.Array]
Outputs = dict[str, jax.Array]

AUXILIARY = "loss.auxiliary"
"""The output that `add-losses` makes of all the losses of routers."""

LOSS_SUM, TOKENS = "loss.sum", "tokens"
"""The sum of the losses of tokens, in nats, and the tokens that have a target."""

SUMS = (LOSS_SUM, "output_z", "hits", TOKENS)
"""Sums over the targets of a batch, and their number, beside the outputs of the graph."""

Gradients = Callable[..., tuple[dict[str, jax.Array], Outputs]]
"""``(trained, fixed, inputs, key)`` → gradients by name, and sums over the batch."""


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a graph over a batch, on the shards of one device.

    Attributes:
      graph: of a micro-batch.
      lowering: how and where it is lowered.
      micro_batches: how many there are.
      rows: sequences that stay together: those of a token group, one at least.
      output_z: the coefficient of the z-loss of the output's softmax.
      chunk_bytes: of the logits of a chunk, about.
      reduce_dtype: the type in which gradients are added and reduced; None for their own.
    """

    graph: Graph
    lowering: LoweringConfig
    micro_batches: int = 1
    rows: int = 1
    output_z: float = 0.0
    chunk_bytes: int = 1 << 62
    reduce_dtype: DTypeLike | None = None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh whose shards arrays are."""
        return None if self.lowering.view is None else self.lowering.view.mesh

    def gradients(
        self, trained: Arrays, fixed: Arrays, inputs: Arrays, key: jax.Array
    ) -> tuple[dict[str, jax.Array], Outputs]:
        """Return the gradients of a batch, reduced over devices, and its sums.

        Args:
          trained: the parameters that have a gradient.
          fixed: the others.
          inputs: of the graph but for its key, and the targets.
          key: of all that is random in the batch.
        """
        over = self._batch_axes
        view = self.lowering.fresh()
        apart = {n: view.varying(a, over - self._own(n)) for n, a in trained.items()}
        total = self._targets(inputs[TARGETS])
        stored = self._stored({**apart, **fixed})
        taken = {n: self._slope(stored[n]) if n in stored else a for n, a in apart.items()}

        def of_part(part: Arrays, number: jax.Array | int) -> tuple[PyTree, Outputs]:
            loss = partial(self._loss, stored=stored, fixed=fixed, inputs=part, total=total,
                           key=jax.random.fold_in(key, number))  # fmt: skip
            slopes, sums = jax.grad(loss, has_aux=True)(taken)
            return self._narrow(slopes), sums

        slopes, sums = self._over_parts(of_part, inputs)
        reduced = {n: self._reduced(g, trained[n], n) for n, g in slopes.items()}
        return reduced, {**sums, TOKENS: total}

    def values(self, params: Arrays, inputs: Arrays, key: jax.Array) -> Outputs:
        """Return the sums of a batch, without gradients."""
        total = self._targets(inputs[TARGETS])

        loss = partial(self._loss, {}, stored=self._stored(params), fixed=params, total=total)

        def of_part(part: Arrays, number: jax.Array | int) -> Outputs:
            return loss(inputs=part, key=jax.random.fold_in(key, number))[1]

        return {**self._over_parts(of_part, inputs), TOKENS: total}

    def _over_parts(self, of_part: Function, inputs: Arrays) -> PyTree:
        """Return the sum of what `of_part` makes of the micro-batches."""
        if self.micro_batches == 1:
            return of_part(inputs, 0)
        totals = {n: a for n, a in inputs.items() if n in totals_of(self.graph)}
        parts = {n: self._cut(n, a) for n, a in inputs.items() if n not in totals}

        def add(total: PyTree, part: tuple[Arrays, jax.Array]) -> tuple[PyTree, None]:
            made = of_part({**part[0], **totals}, part[1])
            return jax.tree.map(jnp.add, total, made), None

        # From zeros, and not from the first part: a scan over what is left of two would be no loop,
        # and XLA would keep what both need at the same time.
        first = {n: a[0] for n, a in parts.items()}
        shapes = jax.eval_shape(lambda: of_part({**first, **totals}, 0))
        zeros = jax.tree.map(zeros_like_on_devices, shapes)
        numbers = jnp.arange(self.micro_batches)
        return jax.lax.scan(add, zeros, (parts, numbers))[0]

    def _loss(
        self, trained: Arrays, *, stored: Arrays, fixed: Arrays, inputs: Arrays, total: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, Outputs]:  # fmt: skip
        """Return what a micro-batch adds to the loss, and its sums.

        Args:
          trained: what has a gradient: parameters, of those in `stored` their `slope`.
          stored: the parameters that loops cast.
          fixed: the other parameters.
          inputs: of the micro-batch.
          total: the number of targets of the whole batch.
          key: of all that is random in it.
        """
        graph, head = self.graph, self._head
        params = {**fixed, **trained}
        arrays = {v: key if v.type.dtype == KEY else inputs[n] for n, v in graph.inputs.items()}
        arrays |= {v: params[n] for n, v in graph.params.items() if v.users}
        masters = {
            graph.params[n]: Master(a, trained[n] if n in trained else self._slope(a))
            for n, a in stored.items()
        }
        values = self.lowering.lower(head.trunk, {**arrays, **masters})
        hidden, weights = (
            tuple(arrays[v] if v in arrays else values[v].to(v.type.names).array for v in group)
            for group in (head.hidden, head.weights)
        )
        of_head = HeadLoss(head, self.lowering, self.output_z, self.chunk_bytes)
        summed, sums = of_head(hidden, weights, inputs[TARGETS])
        summed, sums = self._everywhere((summed, sums))
        outputs = {n: self._settled(values[v], v) for n, v in summed_outputs(graph).items()}
        loss = summed / jnp.maximum(total, 1).astype(summed.dtype)
        return loss + outputs.get(AUXILIARY, 0.0), {**outputs, **sums}

    # --- parameters that are cast a layer at a time

    def _stored(self, params: Arrays) -> dict[str, jax.Array]:
        """Return those of `params` that are wider than the computation, and that loops alone read.

        Cast beforehand there would be a copy of all layers for the whole step.
        """
        width, values = self.lowering.dtype.itemsize_bytes, self.graph.params
        floats = {n: a for n, a in params.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        return {
            n: a
            for n, a in floats.items()
            if a.dtype.itemsize > width and is_cast_by_layer(values[n])
        }

    def _slope(self, stored: jax.Array) -> jax.Array:
        """Return that by which the gradient of a parameter leaves a loop that casts it."""
        kind = self.lowering.dtype.numpy
        return zeros_like_on_devices(jax.eval_shape(lambda a: a.astype(kind), stored))

    # --- what lies where

    @property
    def _head(self) -> Head:
        return split_head(self.graph)

    @property
    def _batch_axes(self) -> frozenset[str]:
        """The mesh axes along which devices have sequences of their own."""
        return frozenset(
            m for v in self.graph.inputs.values() if "batch" in v.type for m in v.type["batch"].mesh
        )

    def _own(self, name: str) -> frozenset[str]:
        """Return the mesh axes over which a parameter is sharded."""
        return frozenset(m for a in self.graph.params[name].type.axes for m in a.mesh)

    def _everywhere(self, local: PyTree) -> PyTree:
        """Return the sums over the devices that have tokens of their own."""
        if self.mesh is None:
            return local
        axes = tuple(sorted(token_axes(self._head.logits.type)))
        view = self.lowering.fresh()
        return jax.tree.map(lambda a: psum(view.varying(a, frozenset(axes)), axes), local)

    def _settled(self, value: Named, declared: Value) -> jax.Array:
        return self.lowering.fresh().settled(finalize_output(value, declared), declared.type)

    def _targets(self, targets: jax.Array) -> jax.Array:
        """Return the number of targets of the whole batch."""
        found: jax.Array = self._everywhere(jnp.sum(targets != IGNORED))
        return found

    def _narrow(self, slopes: PyTree) -> PyTree:
        if self.reduce_dtype is None:
            return slopes
        return jax.tree.map(lambda g: g.astype(self.reduce_dtype), slopes)

    def _reduced(self, slope: jax.Array, param: jax.Array, name: str) -> jax.Array:
        axes = tuple(sorted(self._batch_axes - self._own(name)))
        if self.mesh is not None and axes:
            slope = psum(slope, axes)
        return slope.astype(param.dtype)

    def _cut(self, name: str, array: jax.Array) -> jax.Array:
        """Return ``[micro-batch, …]``: token groups in turn, so that a mesh does not matter.

        Raises:
          InputError: micro-batches would cut token groups.
        """
        at = self._types[name].names.index("batch")
        array = jnp.moveaxis(array, at, 0)
        batch = array.shape[0]
        together = self.micro_batches * self.rows
        if batch % together:
            raise InputError(
                "micro-batches hold whole token groups",
                where=f"the batch on a device, {amount(batch, 'sequence')}",
                expected=f"a multiple of {self.micro_batches} micro-batches × "
                f"{amount(self.rows, 'sequence')}",
                found=str(batch),
                hint="another data.batch, fewer run.micro_batches, or fewer devices that share it",
            )
        shape = (batch // together, self.micro_batches, self.rows, *array.shape[1:])
        turned = jnp.moveaxis(array.reshape(shape), 1, 0)
        parts = turned.reshape(self.micro_batches, batch // self.micro_batches, *array.shape[1:])
        return jnp.moveaxis(parts, 1, at + 1)

    @property
    def _types(self) -> dict[str, TensorType]:
        """The types of what a batch holds."""
        return batch_types(self.graph)


def token_axes(logits: TensorType) -> frozenset[str]:
    """Return the mesh axes along which devices have tokens of their own."""
    return frozenset(m for a in logits.axes if a.name != "vocab" for m in a.mesh)


def summed_outputs(graph: Graph) -> dict[str, Value]:
    """Return the outputs of `graph` that add up over a batch: not its logits, nor its masks."""
    return {n: v for n, v in graph.outputs.items() if n != LOGITS and not n.startswith(MASK)}


def input_types(graph: Graph) -> dict[str, TensorType]:
    """Return the types of the inputs of `graph`, but for its key."""
    return {n: v.type for n, v in graph.inputs.items() if v.type.dtype != KEY}


def batch_types(graph: Graph) -> dict[str, TensorType]:
    """Return the types of what a batch of `graph` holds: targets, and inputs but key and totals."""
    logits, totals = graph.outputs[LOGITS].type, totals_of(graph)
    targets = logits.with_dtype(I32).with_axes(a for a in logits.axes if a.name != "vocab")
    inputs = {n: t for n, t in input_types(graph).items() if n not in totals}
    return {**inputs, TARGETS: targets}
