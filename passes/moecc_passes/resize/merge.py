"""The pass ``merge``: neighbouring experts become their mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.errors import InputError, Problem
from moecc.ir.gates import convention
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark, weakest
from moecc.rewrite.driver import may_rewrite
from moecc.weights.expr import Expr
from moecc_passes.resize.anatomy import Anatomy, anatomies, members
from moecc_passes.resize.rebuild import mean, resize
from moecc_passes.routed import NOTHING_ROUTED


@dataclass(frozen=True)
class MergePass(Pass):
    """Replace every `size` neighbouring experts by the mean of their weights and router rows.

    This undoes ``grow``: where neighbours are copies with equal rows, and tokens go to whole
    groups, the function stays, and the tensors are bit for bit those before ``grow``.

    Before::

        %e, %g = route %l {top_k=4} : i32[…, choice=4], f32[…, choice=4]    # of 16 experts

    After ``merge{size=2}``::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts
    """

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "replace neighbouring experts by their mean"
    must_match: ClassVar[bool] = True

    size: Annotated[int, "how many neighbours become one"] = 2

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
        problems = [problem for layer in layers for problem in self._problems(layer)]
        if problems:
            raise InputError(problems)
        promises = [self._promise(layer) for layer in layers]
        for layer in layers:
            if not may_rewrite(self.name, layer.name):
                break
            row = convention(layer.attrs.gates)
            factor = 1.0 if row.renormalised or row.score == "softmax" else float(self.size)
            top_k = max(layer.attrs.top_k // self.size, 1)
            bias = layer.bias_factor(1 / self.size)
            resize(graph, layer, self._means, top_k, factor, bias)
            made = layer.experts // self.size
            ctx.remark(Remark(layer.name, f"{layer.experts} experts became {made}, top-{top_k}"))
        result = PassResult(bool(layers), len(layers), {"layers": len(layers)})
        result.near_misses = [] if layers else [NOTHING_ROUTED]
        result.preserves = weakest(dict.fromkeys(promises)) if promises else None
        return result

    def _means(self, parts: list[Expr]) -> list[Expr]:
        return [mean(group) for group in self._groups(parts)]

    def _groups(self, parts: list[Expr]) -> list[list[Expr]]:
        return [parts[at : at + self.size] for at in range(0, len(parts), self.size)]

    def _promise(self, layer: Anatomy) -> Preserves:
        row = convention(layer.attrs.gates)
        equal = all(
            len(set(group)) == 1 for p in layer.params for group in self._groups(members(p))
        )
        whole = layer.attrs.top_k % self.size == 0 and layer.layer.assignment.slots == "ragged"
        if equal and whole and row.equal_for_equal_logits and row.max_top_k is None:
            return Preserves("reassociation")
        return self.preserves

    def _problems(self, layer: Anatomy) -> Iterator[Problem]:
        if layer.experts % self.size:
            yield Problem("the experts do not divide into groups", layer.name,
                          f"a divisor of {layer.experts}", f"size={self.size}")  # fmt: skip
        elif layer.experts == self.size:
            yield Problem("one expert is no mixture", layer.name, hint="to-dense{how=mean}")
