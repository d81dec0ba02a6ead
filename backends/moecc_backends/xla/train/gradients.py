"""The loss of a batch and its gradients on one device, and how they are lifted over a mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moecc.analysis import VOCAB, OutputHead, chunk_count, split_head
from moecc.errors import InputError, Problem, raise_problems
from moecc.ir.conventions import AUXILIARY, LOGITS
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh, mesh_of, required_mesh
from moecc.ir.ops.repetition import repetitions
from moecc.ir.routing_losses import MASK
from moecc.sharding.layout import value_spec
from moecc.support.text import amount
from moecc.train.batches import TARGETS, TEACHER
from moecc.train.objectives import IGNORED
from moecc.train.settings import StepSpec, rows_together, totals_of
from moecc.types import I32, KEY, DType, TensorType
from moecc_backends.xla.lower.function import (
    Given,
    GspmdLowering,
    finalize_output,
    function,
    group_counts,
    lower_values,
    sharded_function,
    spec,
)
from moecc_backends.xla.lower.scan import is_cast_by_layer, is_stacked
from moecc_backends.xla.trace.context import (
    DIRECT,
    DeviceView,
    Interceptor,
    Options,
    zeros_like_on_devices,
)
from moecc_backends.xla.trace.host_arrays import Master
from moecc_backends.xla.trace.values import (
    Arrays,
    Function,
    Named,
    NamedArrays,
    Names,
    Outputs,
    PyTree,
    accumulator,
    is_float,
    varies,
)

# The cross entropy of a head: a chunk of tokens at a time, on the shards that a device has.
#
# Logits of a large vocabulary would take more memory than the rest of a step. Gradients of a chunk
# are made with its loss, so that nothing of it is kept or computed again.


@dataclass(frozen=True)
class LoweringConfig:
    """How and where nodes are lowered.

    Attributes:
      dtype: the type of the computation.
      options: what is chosen for the lowering.
      mesh: the mesh whose shards arrays are; None where they are whole.
      interceptor: calls each lowering.
    """

    dtype: DType
    options: Options
    mesh: Mesh | None
    interceptor: Interceptor

    def fresh(self) -> DeviceView:
        """Return the device, with nothing remembered of another trace."""
        return DeviceView(self.mesh)

    def lower(self, nodes: Sequence[Node], arrays: Mapping[Value, Given]) -> Mapping[Value, Named]:
        """Return the values of `nodes`, lowered under the current trace."""
        values = lower_values(
            list(nodes), arrays, self.dtype, self.options, self.fresh(), self.interceptor
        )
        # What the head and its users read has no slots: rows stay inside of expert layers.
        return cast("Mapping[Value, Named]", values)


class Aims(NamedTuple):
    """What the logits of tokens are compared with.

    Attributes:
      targets: the ids, ``[…]``.
      teacher: the logits of a teacher, like those of the head, and what the divergence from it is
        multiplied by; None without one.
    """

    targets: Array
    teacher: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a head, as a function of hidden states, weights and targets.

    Attributes:
      head: the head.
      lowering: how and where it is lowered.
      output_z: the coefficient of the z-loss of the softmax.
      chunk_bytes: bytes of logits in float32 that a chunk has, about.
    """

    head: OutputHead
    lowering: LoweringConfig
    output_z: float
    chunk_bytes: int

    def __call__(self, hidden: Arrays, weights: Arrays, aims: Aims) -> tuple[Array, Outputs]:
        """Return the loss summed over the tokens of this device, and sums; see `token_losses`."""
        names, targets = self.head.logits.type.names, aims.targets
        axes = tuple(n for n in names if n != VOCAB)
        count = self._chunks(targets.size, weights)
        if count == 1:
            return self.summed(weights, hidden, aims)
        pairs = zip(hidden, self.head.hidden, strict=True)
        flat = tuple(_chunks(Named(a, v.type.names), axes, count, 0) for a, v in pairs)
        parts = Aims(_chunks(Named(targets, axes), axes, count, IGNORED))
        if aims.teacher is not None:
            taught, coefficient = aims.teacher
            chunks = _chunks(Named(taught, names), axes, count, 0)
            parts = Aims(parts.targets, (chunks, jnp.broadcast_to(coefficient, (count,))))
        over = self.varies(*hidden, targets)
        # Gradients of weights are added over all chunks before devices add theirs.
        apart = tuple(self.lowering.fresh().varying(w, over) for w in weights)
        return _chunked(self, apart, flat, parts)

    def varies(self, *arrays: Array) -> frozenset[str]:
        """Return the mesh axes along which any of `arrays` may differ."""
        if self.lowering.mesh is None:
            return frozenset()
        return varies(*arrays)

    def _chunks(self, tokens: int, weights: Arrays) -> int:
        """Return in how many chunks the tokens are cut."""
        if not self.head.is_cut:
            return 1
        vocab = self.head.logits.type[VOCAB]
        logits_bytes = 4 * tokens * vocab.fixed_size // self.lowering.fresh().shard_count(vocab)
        weights_bytes = sum(4 * weight.size for weight in weights)
        return min(chunk_count(logits_bytes, weights_bytes, self.chunk_bytes), max(tokens, 1))

    def summed(self, weights: Arrays, hidden: Arrays, aims: Aims) -> tuple[Array, Outputs]:
        """Return the loss of all tokens at once."""
        targets = aims.targets
        operands = zip((*self.head.hidden, *self.head.weights), (*hidden, *weights), strict=True)
        values = self.lowering.lower(self.head.nodes, dict(operands))
        logits, type = values[self.head.logits], self.head.logits.type
        names = (*(n for n in type.names if n != VOCAB), VOCAB)
        losses = token_losses(
            logits.to(names).array, targets, type[VOCAB].mesh, self.lowering.fresh()
        )
        sums = {n: jnp.sum(jnp.where(targets != IGNORED, a, 0)) for n, a in losses.items()}
        loss = sums["loss.sum"]
        if self.output_z:
            loss = loss + self.output_z * sums["output_z"]
        if aims.teacher is not None:
            taught, coefficient = aims.teacher
            each = divergence(Named(taught, type.names).to(names).array, logits.to(names).array)
            sums[DISTILL] = jnp.sum(jnp.where(targets != IGNORED, each, 0))
            loss = loss + coefficient.astype(loss.dtype) * sums[DISTILL]
        return loss, sums


def divergence(teacher: Array, logits: Array) -> Array:
    """Return KL(teacher ‖ model) of each token, from logits ``[…, vocab]`` that are whole."""
    wide = logits.astype(accumulator(logits.dtype))
    fixed = jax.nn.log_softmax(lax.stop_gradient(teacher).astype(wide.dtype))
    return jnp.sum(jnp.exp(fixed) * (fixed - jax.nn.log_softmax(wide)), axis=-1)


def token_losses(logits: Array, targets: Array, mesh: Names, view: DeviceView) -> Outputs:
    """Return −log softmax(logits)[target], (log Σ exp)² and whether it is hit, of each token.

    In float32 at least.  No entry is picked by index, because the vocabulary may be sharded.  A
    target is hit where argmax returns it: of equal logits the first one counts, so that a model
    whose logits are all equal hits token 0 alone.

    Args:
      logits: ``[…, vocab]``; where it is sharded, the local shard.
      targets: ``[…]``.
      mesh: the mesh axes over which the vocabulary is sharded.
      view: the device.
    """
    wide, aims = logits.astype(accumulator(logits.dtype)), targets[..., None]
    fixed = lax.stop_gradient(wide)
    top = jnp.max(fixed, axis=-1)
    is_sharded = view.mesh is not None and bool(mesh)
    if is_sharded:
        top = lax.pmax(top, mesh)
    total = jnp.sum(jnp.exp(wide - top[..., None]), axis=-1)
    first = view.shard_index(mesh) * wide.shape[-1]
    entry = lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1) + first
    picked = jnp.sum(jnp.where(entry == aims, wide, 0), axis=-1)
    is_tied_before = (entry < aims) & (fixed >= top[..., None])
    ties_before = jnp.sum(is_tied_before, axis=-1, dtype=jnp.int32)
    if is_sharded:
        total, picked, ties_before = (lax.psum(x, mesh) for x in (total, picked, ties_before))
    log_total = jnp.log(total) + top
    hit = (lax.stop_gradient(picked) >= top) & (ties_before == 0)
    return {
        "loss.sum": log_total - picked,
        "output_z": jnp.square(log_total),
        "hits": hit.astype(wide.dtype),
    }


def _chunks(x: Named, axes: Names, count: int, fill: int) -> Array:
    """Return chunks of tokens in front of the axes of `x`, of which only the last has a size.

    Args:
      x: ``[…]``, with the axes of tokens among its own.
      axes: those of tokens.
      count: the number of chunks.
      fill: what is put behind the last token, to make chunks whole.
    """
    inner = tuple(n for n in x.axes if n not in axes)
    array = x.to((*axes, *inner)).array
    tokens = prod(array.shape[: len(axes)])
    each = -(-tokens // count)
    rows = array.reshape(tokens, *array.shape[len(axes) :])
    padding = [(0, count * each - tokens), *((0, 0) for _ in inner)]
    rows = jnp.pad(rows, padding, constant_values=fill)
    ones = (1,) * (len(axes) - 1)
    chunks = Named(rows.reshape(count, *ones, each, *rows.shape[1:]), ("chunk", *axes, *inner))
    return chunks.to(("chunk", *x.axes)).array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(loss: HeadLoss, weights: Arrays, hidden: Arrays, aims: Aims) -> tuple[Array, Outputs]:
    """Return the loss of chunks of tokens, one after the other."""

    def add(total: PyTree, chunk: tuple[Arrays, Aims]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, loss.summed(weights, *chunk)), None

    total: tuple[Array, Outputs]
    total, _ = lax.scan(add, _zeros(loss, weights, hidden, aims), (hidden, aims))
    return total


def _forward(
    loss: HeadLoss, weights: Arrays, hidden: Arrays, aims: Aims
) -> tuple[tuple[Array, Outputs], PyTree]:
    slopes_of = jax.value_and_grad(loss.summed, argnums=(0, 1), has_aux=True)

    def add(total: PyTree, chunk: tuple[Arrays, Aims]) -> tuple[PyTree, Arrays]:
        sums, (by_weights, by_hidden) = slopes_of(weights, *chunk)
        return jax.tree.map(jnp.add, total, (sums, by_weights)), by_hidden

    view = loss.lowering.fresh()
    empty = tuple(
        view.varying(jnp.zeros(w.shape, accumulator(w.dtype)), loss.varies(w)) for w in weights
    )
    start = _zeros(loss, weights, hidden, aims), empty
    (sums, by_weights), by_hidden = lax.scan(add, start, (hidden, aims))
    narrow = tuple(g.astype(w.dtype) for g, w in zip(by_weights, weights, strict=True))
    return sums, (narrow, by_hidden)


def _backward(loss: HeadLoss, slopes: PyTree, cotangents: tuple[Array, Outputs]) -> PyTree:
    by_arrays = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), slopes)
    return (*by_arrays, None)


_chunked.defvjp(_forward, _backward)


def _zeros(loss: HeadLoss, weights: Arrays, hidden: Arrays, aims: Aims) -> tuple[Array, Outputs]:
    """Return sums of no tokens."""
    first = jax.tree.map(lambda a: a[0], (hidden, aims))
    shapes = jax.eval_shape(loss.summed, weights, *first)
    view = loss.lowering.fresh()
    # Along the axes that shard the vocabulary the devices have summed their parts of the softmax.
    over = loss.varies(*hidden, aims.targets) - set(loss.head.logits.type[VOCAB].mesh)
    return jax.tree.map(lambda a: view.varying(jnp.zeros(a.shape, a.dtype), over), shapes)


LOSS_SUM, TOKENS = "loss.sum", "tokens"
"""The sum of the losses of tokens, in nats, and the tokens that have a target."""

DISTILL, COEFFICIENT = "distill", "distill.coefficient"
"""The divergence from a teacher, and what it is multiplied by in the loss."""

TAUGHT = (TEACHER, COEFFICIENT)
"""What a batch has of a teacher."""

SUMS = (LOSS_SUM, "output_z", "hits", TOKENS)
"""Outputs over the targets of a batch, and their number, beside the outputs of the graph."""


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a graph over a batch, on the shards of one device.

    Attributes:
      graph: the graph of a micro-batch.
      where: the settings of the step, and where its arrays lie.
    """

    graph: Graph
    where: StepShardings

    @cached_property
    def lowering(self) -> LoweringConfig:
        """How and where nodes are lowered."""
        return self.where.lowering

    def gradients(
        self, trained: NamedArrays, fixed: NamedArrays, inputs: NamedArrays, key: Array
    ) -> tuple[Outputs, Outputs]:
        """Return the gradients of a batch, reduced over devices, and its sums.

        Args:
          trained: the parameters that have a gradient.
          fixed: the others.
          inputs: the inputs of the graph but its key, and the targets.
          key: the random key of the batch.
        """
        # The mesh axes along which devices have sequences of their own, and share the parameter.
        batch = {
            m for v in self.graph.inputs.values() if "batch" in v.type for m in v.type["batch"].mesh
        }
        over = {
            n: frozenset(batch.difference(*(a.mesh for a in self.graph.params[n].type.axes)))
            for n in trained
        }
        view = self.lowering.fresh()
        apart = {n: view.varying(a, over[n]) for n, a in trained.items()}
        total = self._targets(inputs[TARGETS])
        stored = self._stored({**apart, **fixed})
        differentiated = {n: self._slope(stored[n]) if n in stored else a for n, a in apart.items()}
        kind = self.where.spec.config.reduce_type.numpy

        def of_part(part: NamedArrays, number: Array | int) -> tuple[PyTree, Outputs]:
            loss = partial(
                self._loss,
                stored=stored,
                fixed=fixed,
                inputs=part,
                total=total,
                key=jax.random.fold_in(key, number),
            )
            slopes, sums = jax.grad(loss, has_aux=True)(differentiated)
            return jax.tree.map(lambda g: g.astype(kind), slopes), sums

        def reduced(name: str, slope: Array) -> Array:
            axes = tuple(sorted(over[name]))
            if self.lowering.mesh is not None and axes:
                slope = lax.psum(slope, axes)
            return slope.astype(trained[name].dtype)

        slopes, sums = self._over_parts(of_part, inputs)
        return {n: reduced(n, g) for n, g in slopes.items()}, {**sums, TOKENS: total}

    def values(self, params: NamedArrays, inputs: NamedArrays, key: Array) -> Outputs:
        """Return the sums of a batch, without gradients."""
        total = self._targets(inputs[TARGETS])
        loss = partial(self._loss, {}, stored=self._stored(params), fixed=params, total=total)

        def of_part(part: NamedArrays, number: Array | int) -> Outputs:
            return loss(inputs=part, key=jax.random.fold_in(key, number))[1]

        return {**self._over_parts(of_part, inputs), TOKENS: total}

    def _over_parts(self, of_part: Function, inputs: NamedArrays) -> PyTree:
        """Return the sum of what `of_part` makes of the micro-batches.

        Raises:
          InputError: micro-batches would cut token groups.
        """
        spec = self.where.spec
        count = spec.config.micro_batches
        batch = {v.type["batch"].size for v in self.graph.inputs.values() if "batch" in v.type}
        sizes = {n: size // count if n in batch else size for n, size in spec.sizes.items()}
        rows = rows_together(self.graph, sizes)
        if count == 1:
            return of_part(inputs, 0)
        undivided = (*totals_of(self.graph), COEFFICIENT)
        totals = {n: a for n, a in inputs.items() if n in undivided}
        types = {**batch_types(self.graph), TEACHER: self.graph.outputs[LOGITS].type}
        parts = {
            n: _micro_batches(a, types[n].names.index("batch"), count, rows)
            for n, a in inputs.items()
            if n not in totals
        }

        def add(total: PyTree, part: tuple[NamedArrays, Array]) -> tuple[PyTree, None]:
            sums = of_part({**part[0], **totals}, part[1])
            return jax.tree.map(jnp.add, total, sums), None

        # From zeros, and not from the first part: a scan over what is left of two would be no loop,
        # and XLA would keep what both need at the same time.
        first = {n: a[0] for n, a in parts.items()}
        shapes = jax.eval_shape(lambda: of_part({**first, **totals}, 0))
        zeros = jax.tree.map(zeros_like_on_devices, shapes)
        return lax.scan(add, zeros, (parts, jnp.arange(count)))[0]

    def _loss(
        self,
        trained: NamedArrays,
        *,
        stored: NamedArrays,
        fixed: NamedArrays,
        inputs: NamedArrays,
        total: Array,
        key: Array,
    ) -> tuple[Array, Outputs]:
        """Return what a micro-batch adds to the loss, and its sums.

        Args:
          trained: what has a gradient: parameters, of those in `stored` their `slope`.
          stored: the parameters that loops cast.
          fixed: the other parameters.
          inputs: the inputs of the micro-batch.
          total: the number of targets of the whole batch.
          key: the random key of the micro-batch.
        """
        graph, head, spec = self.graph, self._head, self.where.spec
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
        # The partitioner would reduce the gradients of the head once a chunk.
        chunk_bytes = spec.chunk_bytes if spec.layout is None else 1 << 62
        of_head = HeadLoss(head, self.lowering, spec.output_z, chunk_bytes)
        taught = (inputs[TEACHER], inputs[COEFFICIENT]) if TEACHER in inputs else None
        aims = Aims(inputs[TARGETS], taught)
        summed, sums = self._everywhere(of_head(hidden, weights, aims))
        outputs = {
            n: self.lowering.fresh().settled(finalize_output(values[v], v), v.type)
            for n, v in summed_outputs(graph).items()
        }
        loss = summed / jnp.maximum(total, 1).astype(summed.dtype)
        return loss + outputs.get(AUXILIARY, 0.0), {**outputs, **sums}

    def _stored(self, params: NamedArrays) -> Outputs:
        """Return the parameters that are wider than the computation, and that loops alone read.

        Cast beforehand there would be a copy of all layers for the whole step.
        """
        return {
            n: a
            for n, a in params.items()
            if is_float(a.dtype)
            and a.dtype.itemsize > self.lowering.dtype.itemsize_bytes
            and is_cast_by_layer(self.graph.params[n])
        }

    def _slope(self, stored: Array) -> Array:
        """Return the array by which the gradient of a parameter leaves the loop that casts it."""
        kind = self.lowering.dtype.numpy
        return zeros_like_on_devices(jax.eval_shape(lambda a: a.astype(kind), stored))

    @cached_property
    def _head(self) -> OutputHead:
        return split_head(self.graph)

    def _everywhere(self, local: PyTree) -> PyTree:
        """Return the sums over the devices that have tokens of their own."""
        if self.lowering.mesh is None:
            return local
        type = self._head.logits.type
        axes = frozenset(m for a in type.axes if a.name != VOCAB for m in a.mesh)
        view, names = self.lowering.fresh(), tuple(sorted(axes))
        return jax.tree.map(lambda a: lax.psum(view.varying(a, axes), names), local)

    def _targets(self, targets: Array) -> Array:
        """Return the number of targets of the whole batch."""
        return self._everywhere(jnp.sum(targets != IGNORED))


def _micro_batches(array: Array, at: int, count: int, rows: int) -> Array:
    """Return ``[micro-batch, …]``: token groups in turn, so that a mesh does not matter.

    Args:
      array: an input of a batch.
      at: the position of its batch axis.
      count: the number of micro-batches.
      rows: the sequences that stay together.

    Raises:
      InputError: micro-batches would cut token groups.
    """
    array = jnp.moveaxis(array, at, 0)
    batch, *sizes = array.shape
    together = count * rows
    if batch % together:
        raise InputError(
            "micro-batches hold whole token groups",
            where=f"the batch on a device, {amount(batch, 'sequence')}",
            expected=f"a multiple of {count} micro-batches × {amount(rows, 'sequence')}",
            found=str(batch),
            hint="another data.batch, fewer run.micro_batches, or fewer devices that share it",
        )
    turned = array.reshape(batch // together, count, rows, *sizes).swapaxes(0, 1)
    return jnp.moveaxis(turned.reshape(count, batch // count, *sizes), 1, at + 1)


def summed_outputs(graph: Graph) -> dict[str, Value]:
    """Return the outputs of `graph` that add up over a batch: not its logits, nor its masks."""
    return {n: v for n, v in graph.outputs.items() if n != LOGITS and not n.startswith(MASK)}


def input_types(graph: Graph) -> dict[str, TensorType]:
    """Return the types of the inputs of `graph`, but for its key."""
    return {n: v.type for n, v in graph.inputs.items() if v.type.dtype != KEY}


def batch_types(graph: Graph) -> dict[str, TensorType]:
    """Return the types of what a batch of `graph` holds: targets, and inputs but key and totals."""
    logits, totals = graph.outputs[LOGITS].type, totals_of(graph)
    targets = logits.with_dtype(I32).with_axes(a for a in logits.axes if a.name != VOCAB)
    inputs = {n: t for n, t in input_types(graph).items() if n not in totals}
    return {**inputs, TARGETS: targets}


# Where parameters and inputs of a training step are sharded, and the graph as its model.
#
# Types of the graph say it, with the graph's own collectives; or a layout of the plan does, and
# XLA's partitioner adds the collectives.


@dataclass(frozen=True)
class StepShardings:
    """Where the parameters and inputs of a step lie, and how its graph is lowered there.

    Attributes:
      spec: the settings of the step.
      device: the first device, which has everything where there is no mesh.
      mesh: the devices; None for one device.
      grid: the mesh of the graph, whose types state the shardings and which has collectives of its
        own; None on one device, or where XLA's partitioner adds the collectives.
      interceptor: the hints for the partitioner.
    """

    spec: StepSpec
    device: jax.Device
    mesh: jax.sharding.Mesh | None = None
    grid: Mesh | None = None
    interceptor: GspmdLowering | None = None

    @property
    def devices(self) -> list[jax.Device]:
        """All devices, in the order of the mesh."""
        return [self.device] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def whole(self) -> Sharding:
        """The sharding of an array that every device has."""
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def lowering(self) -> LoweringConfig:
        """How and where nodes are lowered: on the shards of a device, or on whole arrays."""
        return LoweringConfig(
            self.spec.config.compute_type,
            Options(platform=self.spec.platform),
            self.grid,
            self.interceptor or DIRECT,
        )

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """The random key of a step, abstractly."""
        return jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=self.whole)

    def param(self, value: Value) -> jax.ShapeDtypeStruct:
        """Return the shape, type and sharding of a parameter."""
        if self.interceptor is None:
            sharding = self._along(value.type)
        else:
            # The axis along which a scan has stacked the parameter.
            scans = (n for n in value.users if n.body is not None and is_stacked(n, value))
            layers = next((repetitions(n.attrs)[0] for n in scans), "")
            sharding = self.interceptor.weight_sharding(value, layers)
        kind = self.spec.config.weight_type.numpy
        return jax.ShapeDtypeStruct(value.type.shape, kind, sharding=sharding)

    def arrays(self, types: Mapping[str, TensorType]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes, types and shardings of inputs and targets."""
        kinds = {"float": self.spec.config.compute_type.numpy, "bool": np.dtype(bool)}
        return {
            name: jax.ShapeDtypeStruct(
                tuple(self._sizes(type).values()),
                kinds.get(type.dtype.kind, np.dtype("int32")),
                sharding=self._along(type),
            )
            for name, type in types.items()
        }

    def _sizes(self, type: TensorType) -> dict[str, int]:
        sizes = self.spec.sizes
        return {a.name: a.size if isinstance(a.size, int) else sizes[str(a.size)] for a in type}

    def _along(self, type: TensorType) -> Sharding:
        if self.interceptor is not None:
            sizes = self._sizes(type)
            return self.interceptor.sharding(tuple(sizes), value_spec(self.interceptor.plan, sizes))
        return self.whole if self.mesh is None else NamedSharding(self.mesh, spec(type))

    def mapped(self, function: Function, arguments: Sequence[PyTree], results: PyTree) -> Function:
        """Return `function`, which works on what `lowering` says, as one of whole arrays.

        Args:
          function: takes trees of arrays.
          arguments: types in place of the arrays that it takes, a tree for each argument; None for
            arrays that every device has.
          results: types in place of the arrays that it returns, likewise.
        """
        if self.grid is None:
            return function
        in_specs, out_specs = jax.tree.map(
            lambda t: PartitionSpec() if t is None else spec(t),
            (tuple(arguments), results),
            is_leaf=lambda t: t is None or isinstance(t, TensorType),
        )
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
        )

    def model(self, graph: Graph) -> Function:
        """Return `graph` as a function ``(params, inputs) → outputs`` of whole arrays."""
        config = self.lowering
        if self.grid is not None:
            assert self.mesh is not None, "a grid is one of devices"
            return sharded_function(graph, self.mesh, dtype=config.dtype, options=config.options)
        return function(
            graph, dtype=config.dtype, options=config.options, interceptor=config.interceptor
        )


def step_shardings(graph: Graph, spec: StepSpec, devices: list[jax.Device]) -> StepShardings:
    """Return the shardings of the step of `graph` over `devices`.

    Raises:
      InputError: the graph is on no mesh and there are several devices, or the mesh cuts a group
        of tokens.
    """
    layout = spec.layout
    if layout is None and mesh_of(graph) is None and len(devices) == 1:
        return StepShardings(spec, devices[0])
    grid = required_mesh(graph) if layout is None else layout.mesh
    mesh = jax.sharding.Mesh(np.array(devices).reshape(grid.shape), grid.names)
    if layout is None:
        return StepShardings(spec, devices[0], mesh, grid)
    shards = layout.shards["batch"]
    problems = [
        Problem(
            f"{' x '.join(layout.batch_axes)} cuts the token groups",
            f"mesh {layout.mesh}",
            f"a divisor of {groups} groups",
            str(shards),
            f"specialize{{groups={shards}}} makes as many groups",
        )
        for groups in sorted(group_counts(graph))
        if groups % shards
    ]
    raise_problems(problems)
    return StepShardings(spec, devices[0], mesh, interceptor=GspmdLowering(mesh, layout))
