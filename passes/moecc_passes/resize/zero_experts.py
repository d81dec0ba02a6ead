"""The pass ``zero-experts``: experts that add nothing, and that no token goes to at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.errors import InputError, Problem
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark, weakest
from moecc.rewrite.driver import may_rewrite
from moecc.weights.expr import Expr
from moecc_passes.resize.layer import (
    WANTED,
    Anatomy,
    Dormant,
    Wanted,
    anatomies,
    kept_by,
    not_dormant,
    resize,
    with_bias,
)
from moecc_passes.routed import NOTHING_ROUTED


@dataclass(frozen=True)
class ZeroExpertsPass(Pass):
    """Add experts whose last matrix is zero, and a bias that keeps them from being chosen.

    Their other matrices and their rows of the router are copies, so that they learn once they are
    chosen.  A token that goes to one then costs as much, and gets nothing (LongCat, arXiv
    2509.01322, has such experts without matrices).

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``zero-experts{count=4}``::

        %e, %g = route %l, %b {top_k=2 using=(bias)} : …    # of 12 experts, %b is -2 of the last 4
    """

    name: ClassVar[str] = "zero-experts"
    summary: ClassVar[str] = "add experts that add nothing, kept from being chosen by a bias"
    must_match: ClassVar[bool] = True

    count: Annotated[int, "how many are added to each layer"] = 1
    bias: Annotated[Wanted, WANTED] = "auto"

    @property
    def preserves(self) -> Preserves:
        """The same function, for any router; `apply` refines it where a bias weighs already."""
        return Preserves("reassociation")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        if self.count >= 1:
            return []
        return [Problem("no expert is added", "count", "1 or more", str(self.count))]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the experts to every routed layer.

        Raises:
          InputError: gates or slots of a layer do not allow it; all problems at once.
        """
        layers = anatomies(graph)
        problems = [
            problem for layer in layers if (problem := not_dormant(layer, self.bias)) is not None
        ]
        if problems:
            raise InputError(problems)
        promises = [self._promise(layer) for layer in layers]
        for layer in layers:
            if not may_rewrite(self.name, layer.name):
                break
            self._add(graph, layer, ctx)
            made = layer.experts + self.count
            add = "adds" if self.count == 1 else "add"
            ctx.remark(Remark(layer.name, f"{self.count} of {made} experts {add} nothing"))
        result = PassResult(bool(layers), len(layers), {"layers": len(layers)})
        result.near_misses = [] if layers else [NOTHING_ROUTED]
        result.preserves = weakest(dict.fromkeys(promises)) if promises else None
        return result

    def _add(self, graph: Graph, layer: Anatomy, ctx: Context) -> None:
        layer, param, value = with_bias(graph, layer, ctx, self.bias)
        numbers = range(layer.experts, layer.experts + self.count)

        def extended(parts: list[Expr]) -> list[Expr]:
            return parts + [parts[number % len(parts)] for number in numbers]

        factor = layer.bias_factor(1 + self.count / layer.experts)
        dormant = Dormant(numbers, param, value, zero=True)
        resize(graph, layer, extended, layer.attrs.top_k, bias_factor=factor, dormant=dormant)

    def _promise(self, layer: Anatomy) -> Preserves:
        """A bias is added to probabilities, which more experts make smaller: alike, or unlike."""
        weighs = layer.bias_of_choice is not None and kept_by(layer, self.bias) == "choice"
        is_softmax = convention(layer.attrs.gates).score == "softmax"
        if weighs and is_softmax and self.count % layer.experts:
            return Preserves("approximate", "probabilities that a bias is added to shrink")
        return self.preserves
