"""Scores of rows: the loss of each row of a batch, as one compiled function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from moecc.analysis.head import LOGITS, VOCAB, check_trainable
from moecc.ir.graph import Graph
from moecc.train.scoring import RowScores
from moecc.types.arrays import Arrays
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.run.device_memory import within_memory
from moecc_backends.xla.run.precision import in_precision
from moecc_backends.xla.trace.typed_jax import PyTree
from moecc_backends.xla.train.loss import IGNORED, TARGETS


@dataclass(frozen=True)
class XlaScorer:
    """A graph with its parameters; see `moecc.train.scoring.Scorer`.

    Attributes:
      graph: the graph.
      params: its parameters, on the device.
      dtype: the type of the computation.
    """

    graph: Graph
    params: dict[str, jax.Array]
    dtype: DType

    @within_memory()
    def __call__(self, batch: Arrays) -> RowScores:
        """Return the scores of a batch.

        Raises:
          MachineError: the memory of a device is too small.
        """
        with in_precision(self.dtype):
            inputs = {n: jnp.asarray(a) for n, a in batch.items() if n in self.graph.inputs}
            keys = (n for n, v in self.graph.inputs.items() if v.type.dtype.kind == "key")
            given = {**inputs, **{name: jax.random.key(0) for name in keys}}
            found = jax.device_get(self._function(self.params, given, jnp.asarray(batch[TARGETS])))
        losses, tokens, hits = (np.asarray(part) for part in found)
        return RowScores(losses.astype(np.float64), tokens, hits)

    @cached_property
    def _function(self) -> PyTree:
        model = function(self.graph, dtype=self.dtype)
        names = self.graph.outputs[LOGITS].type.names
        order = [n for n in names if n != VOCAB]

        def scores(params: PyTree, inputs: PyTree, targets: jax.Array) -> tuple[jax.Array, ...]:
            logits = jnp.moveaxis(model(params, inputs)[LOGITS], names.index(VOCAB), -1)
            wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            counted = targets != IGNORED
            picked = jnp.take_along_axis(wide, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
            losses = jax.nn.logsumexp(wide, axis=-1) - picked
            hits = jnp.argmax(wide, axis=-1) == targets
            along = tuple(range(1, len(order)))
            return (
                jnp.sum(jnp.where(counted, losses, 0), axis=along),
                jnp.sum(counted, axis=along),
                jnp.sum(counted & hits, axis=along),
            )

        return jax.jit(scores)


@within_memory()
def scorer(graph: Graph, params: Arrays, *, dtype: DType) -> XlaScorer:
    """Return the scorer of `graph`; see `moecc.train.scoring.ScoringBackend`.

    Raises:
      InputError: the graph has no logits.
      MachineError: the memory of a device is too small.
    """
    check_trainable(graph)
    with in_precision(dtype):
        placed = {n: jnp.asarray(params[n]) for n, v in graph.params.items() if v.users}
    return XlaScorer(graph, placed, dtype)
