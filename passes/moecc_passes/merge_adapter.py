"""The pass ``merge-adapter``: the model with a LoRA adapter merged into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.ir.structure import weight_of
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.weights.arithmetic import BASE, read_from
from moecc_passes.upcycle.options import unknown_models


@dataclass(frozen=True)
class MergeAdapterPass(Pass):
    """Read every weight from an adapter of the model, or from another model like it.

    An adapter is read as the model that it is merged into; adapters of experts
    (``target_parameters`` of PEFT) are merged expert by expert.

    Before::

        param %q : f32[q=4, embed=4] = source("q" : f32[q=4, embed=4])

    After ``merge-adapter{source=a}``, where the command has ``--experts a=ADAPTER``::

        param %q : f32[q=4, embed=4] = source("a:q" : f32[q=4, embed=4])
    """

    name = "merge-adapter"
    summary = "merge a LoRA adapter into the model"
    preserves = Preserves("approximate", "the weights are those of the adapter")

    source: Annotated[str, "name of the adapter, one of --experts"]

    def validate(self) -> list[Problem]:
        """Return the problem that the source is the model itself."""
        if self.source != BASE:
            return super().validate()
        message, hint = "the model has its own weights already", "--experts a=ADAPTER"
        return [Problem(message, "source", "the name of an adapter", BASE, hint)]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Read the weights from the adapter.

        Raises:
          InputError: there is no such adapter.
        """
        if problems := unknown_models([self.source], ctx.models, "source"):
            raise InputError(problems)
        for param in graph.params.values():
            param.weight = read_from(weight_of(param), self.source)
        ctx.remark(Remark("", f"all weights are those of {self.source}"))
        count = len(graph.params)
        return PassResult(count > 0, count, {"parameters": count})
