"""Run a model over the batches of a token folder, for values inside it rather than its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moecc.backend import get_backend
from moecc.decoding import ReadOnce
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import clone
from moecc.model.open import Model
from moecc.tasks.evaluate import EvaluationSpec, evaluation_recipe
from moecc.train.batches import HeldOutBatches, open_batches
from moecc.train.graphs import eval_graph
from moecc.train.rows import facts_of
from moecc.train.tokens.folder import TokenFolder
from moecc.types import Array


@dataclass(frozen=True)
class Tracing:
    """A graph whose outputs are read, over a token folder.

    Attributes:
      graph: the graph of an evaluation step, its layers apart.
      held_out: the batches.
    """

    graph: Graph
    held_out: HeldOutBatches

    @classmethod
    def of(cls, model: Model, graph: Graph, folder: TokenFolder, spec: EvaluationSpec) -> Tracing:
        """Return the evaluation of `graph`, of `model`, over a folder.

        Raises:
          InputError: the folder does not suit the model.
        """
        recipe = evaluation_recipe(graph, folder, spec)
        program = eval_graph(graph, replace(recipe, run=replace(recipe.run, rolled=False)))
        batches = open_batches(recipe.data, facts_of(model, program))
        return cls(program, next(iter(batches.evaluations.values())))

    def run(
        self, model: Model, wanted: Callable[[str], bool], graph: Graph | None = None
    ) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array], Graph]]:
        """Yield the outputs that are wanted, the batch, and the graph of those outputs.

        Args:
          model: whose weights are read.
          wanted: whether an output is, by its name.
          graph: another one than that of the evaluation, with the same outputs.
        """
        bare = clone(self.graph if graph is None else graph)
        for name in list(bare.output_names):
            if not wanted(name):
                bare.drop_output(name)
        program = get_backend("xla").compile(bare)
        params = ReadOnce(Model(bare, model.name, model.checkpoint).params())
        keys = [n for n, v in bare.inputs.items() if v.type.dtype.kind == "key"]
        for number in range(self.held_out.batches):
            batch = self.held_out.batch(number)
            inputs = {n: batch[n] for n in bare.inputs if n in batch}
            inputs |= {name: np.zeros((), np.uint64) for name in keys}
            yield program.run(params, inputs), batch, bare


def is_token(value: Value, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return the ids of the tokens that a value is of, and which of them are no padding; flat."""
    decoder = value.graph.inputs.get("decoder_tokens")
    in_decoder = decoder is not None and set(decoder.type.sizes) <= set(value.type.sizes)
    prefix = "decoder_" if in_decoder else ""
    tokens = batch[f"{prefix}tokens"]
    real = batch.get(f"{prefix}segments", batch.get(f"{prefix}mask", np.ones_like(tokens)))
    return tokens.reshape(-1), np.asarray(real, bool).reshape(-1)
