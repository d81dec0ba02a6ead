"""The cross entropy of a head: a chunk of tokens at a time, on the shards that a device has.

Logits of a large vocabulary would take more memory than the rest of a step.  Gradients of a chunk
are made with its loss, so that nothing of it is kept or computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import cast

import jax
import jax.numpy as jnp

from moecc.analysis.head import VOCAB, Head, chunk_count
from moecc.ir.graph import Node, Value
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.function import Given, lower_values
from moecc_backends.xla.trace.context import DIRECT, Interceptor
from moecc_backends.xla.trace.device_view import DeviceView, varies
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.trace.typed_jax import PyTree, pmax, psum
from moecc_backends.xla.trace.values import Named

TARGETS = "targets"
"""The input of a step besides those of the graph: the tokens to predict, ``[batch, seq]``."""

IGNORED = -1
"""The target of a token that does not take part in the loss: padding, a prompt."""

Arrays = tuple[jax.Array, ...]

Sums = dict[str, jax.Array]
"""Sums over tokens: of the negative log-likelihood, of (log Σ exp)², of targets hit."""


@dataclass(frozen=True)
class LoweringConfig:
    """How and where nodes are lowered.

    Attributes:
      dtype: the type of the computation.
      options: what is chosen for the lowering.
      view: the device whose shards arrays are; None where they are whole.
      interceptor: calls each lowering.
    """

    dtype: DType
    options: Options
    view: DeviceView | None = None
    interceptor: Interceptor = DIRECT

    def fresh(self) -> DeviceView:
        """Return the device, with nothing remembered of another trace."""
        return DeviceView(None if self.view is None else self.view.mesh)

    def lower(self, nodes: Sequence[Node], arrays: Mapping[Value, Given]) -> Mapping[Value, Named]:
        """Return the values of `nodes`, lowered under the current trace."""
        found = lower_values(
            list(nodes), arrays, self.dtype, self.options, self.fresh(), self.interceptor
        )
        # What the head and its users read has no slots: rows stay inside of expert layers.
        return cast("Mapping[Value, Named]", found)


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a head, as a function of hidden states, weights and targets.

    Attributes:
      head: the head.
      lowering: how and where it is lowered.
      output_z: the coefficient of the z-loss of the softmax.
      chunk_bytes: of logits in float32, about.
    """

    head: Head
    lowering: LoweringConfig
    output_z: float = 0.0
    chunk_bytes: int = 1 << 62

    def __call__(
        self, hidden: Arrays, weights: Arrays, targets: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """Return the loss summed over the tokens of this device, and sums besides."""
        axes = tuple(n for n in self.head.logits.type.names if n != VOCAB)
        count = self._chunks(targets.size, weights)
        if count == 1:
            return self.summed(weights, hidden, targets)
        pairs = zip(hidden, self.head.hidden, strict=True)
        flat = tuple(_chunks(Named(a, v.type.names), axes, count, 0) for a, v in pairs)
        aims = _chunks(Named(targets, axes), axes, count, IGNORED)
        over = self.varies(*hidden, targets)
        # Gradients of weights are added over all chunks before devices add theirs.
        apart = tuple(self.lowering.fresh().varying(w, over) for w in weights)
        return _chunked(self, apart, flat, aims)

    def varies(self, *arrays: jax.Array) -> frozenset[str]:
        """Return the mesh axes along which any of `arrays` may differ."""
        if self.lowering.view is None or self.lowering.view.mesh is None:
            return frozenset()
        return frozenset[str]().union(*map(varies, arrays))

    def _chunks(self, tokens: int, weights: Arrays) -> int:
        """Return in how many chunks the tokens are cut."""
        if not self.head.is_cut:
            return 1
        vocab = self.head.logits.type[VOCAB]
        assert isinstance(vocab.size, int), "the vocabulary is known"
        logits_bytes = 4 * tokens * vocab.size // self.lowering.fresh().shard_count(vocab)
        weights_bytes = sum(4 * weight.size for weight in weights)
        return min(chunk_count(logits_bytes, weights_bytes, self.chunk_bytes), max(tokens, 1))

    def summed(self, weights: Arrays, hidden: Arrays, targets: jax.Array) -> tuple[jax.Array, Sums]:
        """Return the loss of all tokens at once."""
        arrays = dict(zip(self.head.hidden, hidden, strict=True))
        arrays |= dict(zip(self.head.weights, weights, strict=True))
        values = self.lowering.lower(self.head.nodes, arrays)
        logits, type = values[self.head.logits], self.head.logits.type
        names = (*(n for n in type.names if n != VOCAB), VOCAB)
        found = token_losses(
            logits.to(names).array, targets, type[VOCAB].mesh, self.lowering.fresh()
        )
        counted = targets != IGNORED
        sums = {n: jnp.sum(jnp.where(counted, a, 0)) for n, a in found.items()}
        loss = sums["loss.sum"]
        return (loss + self.output_z * sums["output_z"] if self.output_z else loss), sums


def token_losses(
    logits: jax.Array, targets: jax.Array, mesh: tuple[str, ...], view: DeviceView
) -> dict[str, jax.Array]:
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
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top = jnp.max(jax.lax.stop_gradient(wide), axis=-1)
    is_sharded = view.mesh is not None and bool(mesh)
    if is_sharded:
        top = pmax(top, mesh)
    total = jnp.sum(jnp.exp(wide - top[..., None]), axis=-1)
    first = view.shard_index(mesh) * wide.shape[-1]
    entry = jax.lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1) + first
    picked = jnp.sum(jnp.where(entry == targets[..., None], wide, 0), axis=-1)
    is_tied_before = (entry < targets[..., None]) & (jax.lax.stop_gradient(wide) >= top[..., None])
    ties_before = jnp.sum(is_tied_before, axis=-1, dtype=jnp.int32)
    if is_sharded:
        total, picked = psum(total, mesh), psum(picked, mesh)
        ties_before = psum(ties_before, mesh)
    log_total = jnp.log(total) + top
    hit = (jax.lax.stop_gradient(picked) >= top) & (ties_before == 0)
    return {
        "loss.sum": log_total - picked,
        "output_z": jnp.square(log_total),
        "hits": hit.astype(wide.dtype),
    }


def _chunks(x: Named, axes: tuple[str, ...], count: int, fill: int) -> jax.Array:
    """Return chunks of tokens in front of the axes of `x`, of which only the last has a size.

    Args:
      x: ``[…]``, with the axes of tokens among its own.
      axes: those of tokens.
      count: the number of chunks.
      fill: what is put behind the last token, to make chunks whole.
    """
    rest = tuple(n for n in x.axes if n not in axes)
    array = x.to((*axes, *rest)).array
    tokens = prod(array.shape[: len(axes)])
    each = -(-tokens // count)
    rows = array.reshape(tokens, *array.shape[len(axes) :])
    padding = [(0, count * each - tokens), *((0, 0) for _ in rest)]
    rows = jnp.pad(rows, padding, constant_values=fill)
    ones = (1,) * (len(axes) - 1)
    chunks = Named(rows.reshape(count, *ones, each, *rows.shape[1:]), ("chunk", *axes, *rest))
    return chunks.to(("chunk", *x.axes)).array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    loss: HeadLoss, weights: Arrays, hidden: Arrays, targets: jax.Array
) -> tuple[jax.Array, Sums]:
    """Return the loss of chunks of tokens, one after the other."""

    def add(total: PyTree, chunk: tuple[Arrays, jax.Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, loss.summed(weights, *chunk)), None

    total: tuple[jax.Array, Sums]
    total, _ = jax.lax.scan(add, _zeros(loss, weights, hidden, targets), (hidden, targets))
    return total


def _forward(
    loss: HeadLoss, weights: Arrays, hidden: Arrays, targets: jax.Array
) -> tuple[tuple[jax.Array, Sums], tuple[Arrays, Arrays]]:
    slopes_of = jax.value_and_grad(loss.summed, argnums=(0, 1), has_aux=True)

    def add(total: PyTree, chunk: tuple[Arrays, jax.Array]) -> tuple[PyTree, Arrays]:
        made, (by_weights, by_hidden) = slopes_of(weights, *chunk)
        return jax.tree.map(jnp.add, total, (made, by_weights)), by_hidden

    view = loss.lowering.fresh()
    empty = tuple(
        view.varying(jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), loss.varies(w))
        for w in weights
    )
    start = _zeros(loss, weights, hidden, targets), empty
    (made, by_weights), by_hidden = jax.lax.scan(add, start, (hidden, targets))
    narrow = tuple(g.astype(w.dtype) for g, w in zip(by_weights, weights, strict=True))
    return made, (narrow, by_hidden)


def _backward(
    loss: HeadLoss, slopes: tuple[Arrays, Arrays], given: tuple[jax.Array, Sums]
) -> tuple[Arrays, Arrays, None]:
    by_weights, by_hidden = jax.tree.map(lambda g: g * given[0].astype(g.dtype), slopes)
    return by_weights, by_hidden, None


_chunked.defvjp(_forward, _backward)


def _zeros(
    loss: HeadLoss, weights: Arrays, hidden: Arrays, targets: jax.Array
) -> tuple[jax.Array, Sums]:
    """Return sums of no tokens."""
    first = tuple(a[0] for a in hidden)
    shapes = jax.eval_shape(loss.summed, weights, first, targets[0])
    view = loss.lowering.fresh()
    # Along the axes that shard the vocabulary the devices have summed their parts of the softmax.
    over = loss.varies(*hidden, targets) - set(loss.head.logits.type[VOCAB].mesh)
    found: tuple[jax.Array, Sums] = jax.tree.map(
        lambda a: view.varying(jnp.zeros(a.shape, a.dtype), over), shapes
    )
    return found
