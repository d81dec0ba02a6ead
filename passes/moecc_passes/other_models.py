"""Passes that read another model: ``align-neurons`` and ``merge-adapter``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from moecc.analysis import FFNBlock, find_ffn_blocks
from moecc.errors import Problem, raise_problems
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import weight_of
from moecc.rewrite.driver import may_rewrite
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.pattern import NearMiss
from moecc.support.extras import require
from moecc.weights.arithmetic import BASE, read_from
from moecc.weights.movement import Aligned, Take
from moecc_passes.upcycle.options import unknown_models


@dataclass(frozen=True)
class AlignNeuronsPass(Pass):
    """Put the neurons of each dense block in the order that is nearest to another model's.

    The order of neurons does not matter to a block, but to a mean of two models, neuron by neuron.
    Of all orders it is the one of the least squared distance from the other model's weights, an
    assignment (Ainsworth et al., arXiv 2209.04836).

    Before::

        param %up : f32[mlp=4, embed=2] = source("up" : f32[mlp=4, embed=2])

    After ``align-neurons{to=a}``::

        param %up : f32[mlp=4, embed=2] = take(source("up" : …), mlp=aligned(…, axis=mlp))
    """

    name = "align-neurons"
    summary = "put the neurons of dense blocks in the order of another model's"
    must_match = True
    preserves = Preserves("reassociation", "sums over neurons are in another order")

    to: Annotated[str, "name of the reference, a model of --experts"]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Order the neurons of every dense block.

        Raises:
          InputError: there is no such model, or the neurons of a block are read elsewhere, too.
          MachineError: scipy is not installed.
        """
        require("an assignment of neurons", ["align"])
        search = find_ffn_blocks(graph)
        problems = unknown_models([self.to], ctx.models, "to")
        problems += [problem for block in search.blocks for problem in _misfits(block)]
        if ctx.statistics is not None:
            message = "statistics number the neurons of the source as they are"
            problems.append(Problem(message, "--capture", hint="capture the aligned model"))
        raise_problems(problems)
        done = [block for block in search.blocks if may_rewrite(self.name, block.loc)]
        for block in done:
            params = _params(block)
            weights = [weight_of(param) for param in params]
            references = [read_from(weight, self.to) for weight in weights]
            order = Aligned((*weights, *references), block.inner)
            for param, weight in zip(params, weights, strict=True):
                param.weight = Take(weight, block.inner, order)
            text = f"{block.width:,} neurons are ordered as those of {self.to}"
            ctx.remark(Remark(block.loc, text))
        result = PassResult(bool(done), len(done), {"blocks aligned": len(done)})
        result.near_misses = [NearMiss(self.name, r.loc, r.reason) for r in search.refusals]
        return result


def _params(block: FFNBlock) -> list[Value]:
    """Return the parameters of a block that have an axis of neurons."""
    return [param for param in block.params if block.inner in param.type]


def _misfits(block: FFNBlock) -> Iterator[Problem]:
    """Yield the parameters of a block that are read elsewhere, too."""
    for param in _params(block):
        if not param.users.keys() <= set(block.nodes):
            yield Problem("its neurons are read elsewhere, too", block.loc, found=f"%{param.name}")


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
        raise_problems(unknown_models([self.source], ctx.models, "source"))
        for param in graph.params.values():
            param.weight = read_from(weight_of(param), self.source)
        ctx.remark(Remark("", f"all weights are those of {self.source}"))
        count = len(graph.params)
        return PassResult(count > 0, count, {"parameters": count})
