"""Evaluation of a graph: sums over a batch, of which losses over many batches are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moecc.analysis import LOGITS, VOCAB, check_trainable
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.routing_losses import MASK
from moecc.train.batches import TARGETS
from moecc.train.objectives import IGNORED
from moecc.train.scoring import Scorer, TokenScores
from moecc.train.settings import coefficients, counted, finished, totals_of
from moecc.types import Arrays as HostArrays
from moecc.types import DType, TensorType
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.run.program import in_precision, machine_errors
from moecc_backends.xla.trace.values import PyTree, accumulator
from moecc_backends.xla.train.gradients import (
    AUXILIARY,
    LOSS_SUM,
    SUMS,
    TOKENS,
    Arrays,
    BatchLoss,
    Outputs,
    StepShardings,
    batch_types,
    summed_outputs,
)


@dataclass(frozen=True)
class EvaluationStep:
    """A compiled evaluation.

    Attributes:
      graph: the graph of a micro-batch, in evaluation.
      where: the settings of the step, and where its arrays lie.
    """

    graph: Graph
    where: StepShardings

    @cached_property
    def function(self) -> PyTree:
        """The jitted ``(params, batch, key) → metrics``."""
        return jax.jit(self.pure)

    def used(self, params: PyTree) -> PyTree:
        """Return the parameters that the graph reads, by name."""
        return {n: params[n] for n, v in self.graph.params.items() if v.users}

    def pure(self, params: Arrays, batch: Arrays, key: Array) -> Outputs:
        """Return what `TrainStep.evaluate` returns, as a function to trace."""
        graph = self.graph
        types = {n: graph.params[n].type for n in params}
        totals = totals_for(graph, self.where, batch)
        types_of_arguments = (types, {**batch_types(graph), **dict.fromkeys(totals)}, None)
        loss = BatchLoss(graph, self.where)
        run = self.where.mapped(loss.values, types_of_arguments, sum_types(graph))
        sums: Outputs = run(params, {**batch, **totals}, key)
        return {**told(sums, graph), LOSS_SUM: sums[LOSS_SUM], "hits": sums["hits"]}


def totals_for(graph: Graph, where: StepShardings, batch: Arrays) -> Outputs:
    """Return the totals of a batch that the graph of a micro-batch takes."""
    totals = totals_of(graph)
    if not totals:
        return {}
    arrays = {**batch, **_masks(graph, where, batch)}
    parts = where.spec.config.micro_batches
    return {n: jnp.asarray(counted(t, arrays, parts), jnp.float32) for n, t in totals.items()}


def _masks(graph: Graph, where: StepShardings, batch: Arrays) -> Outputs:
    """Return the masks that `graph` computes of the inputs of a batch, and of nothing else."""
    masks = {n: v for n, v in graph.outputs.items() if n.startswith(MASK)}
    if not masks:
        return {}
    nodes, config = _ancestors(graph, masks.values()), where.lowering
    types = {n: t for n, t in batch_types(graph).items() if n in graph.inputs}

    def run(inputs: Arrays) -> Outputs:
        values = config.lower(nodes, {graph.inputs[n]: a for n, a in inputs.items()})
        return {
            n: config.fresh().settled(values[v].to(v.type.names).array, v.type)
            for n, v in masks.items()
        }

    mapped = where.mapped(run, (types,), {n: v.type for n, v in masks.items()})
    return mapped({n: batch[n] for n in types})


def _ancestors(graph: Graph, values: Iterable[Value]) -> list[Node]:
    """Return the nodes that compute `values`, in order."""
    wanted: set[Node] = set()
    left = list(values)
    while left:
        node = left.pop().node
        if node is not None and node not in wanted:
            wanted.add(node)
            left += node.operands
    return [node for node in graph if node in wanted]


def sum_types(graph: Graph) -> dict[str, TensorType | None]:
    """Return the types of the sums over a batch; None for what every device has."""
    outputs = {n: v.type for n, v in summed_outputs(graph).items()}
    return {**outputs, **dict.fromkeys(SUMS)}


def told(sums: Outputs, graph: Graph) -> Outputs:
    """Return the metrics of a step, made of sums over its batch.

    A loss stands there as it is, and times its coefficient, ``.scaled``.
    """
    metrics = {n: a for n, a in finished(sums).items() if n not in SUMS}
    for name, coefficient in coefficients(graph).items():
        if name in sums:
            metrics[f"{name}.scaled"] = coefficient * sums[name]
    count = jnp.maximum(sums[TOKENS], 1).astype(sums[LOSS_SUM].dtype)
    entropy = sums[LOSS_SUM] / count
    loss = entropy + sums.get(AUXILIARY, 0.0)
    return {
        **metrics,
        "loss": loss,
        "loss.cross_entropy": entropy,
        "loss.output_z": sums["output_z"] / count,
        "accuracy": sums["hits"] / count,
        TOKENS: sums[TOKENS],
    }


# Scores of rows: the loss of each row of a batch, as one compiled function.


def scorer(graph: Graph, params: HostArrays, *, dtype: DType) -> Scorer:
    """Return the scorer of `graph`; see `moecc.train.scoring.ScoringBackend`.

    Raises:
      InputError: the graph has no logits.
      MachineError: the memory of a device is too small; the scorer raises it, too.
    """
    check_trainable(graph)
    with machine_errors(), in_precision(dtype):
        placed = {n: jnp.asarray(params[n]) for n, v in graph.params.items() if v.users}
    model = function(graph, dtype=dtype)
    names = graph.outputs[LOGITS].type.names

    @jax.jit
    def scores(params: PyTree, inputs: PyTree, targets: Array) -> tuple[Array, ...]:
        logits = jnp.moveaxis(model(params, inputs)[LOGITS], names.index(VOCAB), -1)
        wide = logits.astype(accumulator(logits.dtype))
        counted = targets != IGNORED
        picked = jnp.take_along_axis(wide, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        losses = jax.nn.logsumexp(wide, axis=-1) - picked
        hits = jnp.argmax(wide, axis=-1) == targets
        return jnp.where(counted, losses, 0), counted, counted & hits

    @machine_errors()
    def score(batch: HostArrays) -> TokenScores:
        with in_precision(dtype):
            inputs = {n: jnp.asarray(a) for n, a in batch.items() if n in graph.inputs}
            keys = (n for n, v in graph.inputs.items() if v.type.dtype.kind == "key")
            inputs |= {name: jax.random.key(0) for name in keys}
            results = jax.device_get(scores(placed, inputs, jnp.asarray(batch[TARGETS])))
        losses, counted, hits = map(np.asarray, results)
        return TokenScores(losses.astype(np.float64), counted, hits)

    return score
