"""The pass ``merge``: several experts become their mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark, weakest
from moecc.rewrite.driver import may_rewrite
from moecc.weights.expr import Expr
from moecc_passes.resize.layer import (
    Anatomy,
    alike,
    anatomies,
    mean,
    members,
    resize,
    statistic,
    unread,
)
from moecc_passes.routed import NOTHING_ROUTED

Groups = list[tuple[int, ...]]

_RESULT = "experts.result"


@dataclass(frozen=True)
class MergePass(Pass):
    """Replace every `size` experts by the mean of their weights and router rows.

    With neighbours this undoes ``grow``: where they are copies with equal rows, and tokens go to
    whole groups, the function stays, and the tensors are bit for bit those before ``grow``.

    Before::

        %e, %g = route %l {top_k=4} : i32[…, choice=4], f32[…, choice=4]    # of 16 experts

    After ``merge{size=2}``::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts
    """

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "replace every few experts by their mean"
    must_match: ClassVar[bool] = True

    size: Annotated[int, "how many experts become one"] = 2
    by: Annotated[
        Literal["number", "result"],
        "which: neighbours; or, from convert --capture, those whose mean results are alike",
    ] = "number"

    @property
    def preserves(self) -> Preserves:
        """The promise for experts that differ; `apply` refines it where they are copies."""
        return Preserves("approximate", f"means of {self.size} experts")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        if self.size >= 2:
            return []
        return [Problem("nothing is merged", "size", "2 or more", str(self.size))]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Merge the experts of every routed layer.

        Raises:
          InputError: the numbers of a layer do not divide; all problems at once.
        """
        layers = anatomies(graph)
        problems = [problem for layer in layers for problem in self._problems(layer, ctx)]
        if problems:
            raise InputError(list(dict.fromkeys(problems)))
        chosen = [self._chosen(layer, ctx) for layer in layers]
        pairs = list(zip(layers, chosen, strict=True))
        promises = [self._promise(layer, groups) for layer, groups in pairs]
        for layer, groups in pairs:
            if not may_rewrite(self.name, layer.name):
                break

            def means(parts: list[Expr], groups: Groups = groups) -> list[Expr]:
                return [mean([parts[number] for number in group]) for group in groups]

            row = convention(layer.attrs.gates)
            factor = 1.0 if row.renormalised or row.score == "softmax" else float(self.size)
            top_k = max(layer.attrs.top_k // self.size, 1)
            bias = layer.bias_factor(1 / self.size)
            resize(graph, layer, means, top_k, factor, bias)
            made = layer.experts // self.size
            ctx.remark(Remark(layer.name, f"{layer.experts} experts became {made}, top-{top_k}"))
        result = PassResult(bool(layers), len(layers), {"layers": len(layers)})
        result.near_misses = [] if layers else [NOTHING_ROUTED]
        result.preserves = weakest(dict.fromkeys(promises)) if promises else None
        return result

    def _chosen(self, layer: Anatomy, ctx: Context) -> Groups:
        """Return the experts that become one, by their numbers."""
        results = statistic(layer, _RESULT, ctx) if self.by == "result" else None
        if results is not None:
            return alike(results, self.size)
        numbers = range(layer.experts)
        return [tuple(numbers[at : at + self.size]) for at in numbers[:: self.size]]

    def _promise(self, layer: Anatomy, groups: Groups) -> Preserves:
        row = convention(layer.attrs.gates)
        equal = all(
            len({weights[number] for number in group}) == 1
            for weights in map(members, layer.params)
            for group in groups
        )
        whole = layer.attrs.top_k % self.size == 0 and layer.layer.assignment.slots == "ragged"
        if equal and whole and row.equal_for_equal_logits and row.max_top_k is None:
            return Preserves("reassociation")
        return self.preserves

    def _problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        if self.by == "result":
            yield from unread(layer, _RESULT, ctx)
        if layer.experts % self.size:
            yield Problem("the experts do not divide into groups", layer.name,
                          f"a divisor of {layer.experts}", f"size={self.size}")  # fmt: skip
        elif layer.experts == self.size:
            yield Problem("one expert is no mixture", layer.name, hint="to-dense{how=mean}")
