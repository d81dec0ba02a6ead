"""The pass ``grow``: every expert several times, and as many more of them chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.driver import may_rewrite
from moecc.weights.expr import Expr
from moecc_passes.resize.layer import (
    WANTED,
    Anatomy,
    Dormant,
    Wanted,
    anatomies,
    not_dormant,
    resize,
    with_bias,
)
from moecc_passes.routed import NOTHING_ROUTED


@dataclass(frozen=True)
class GrowPass(Pass):
    """Store every expert `times` times, and let a token go to `times` as many.

    Copies have equal rows in the router, so that the chosen ones are all copies of those that were
    chosen before, ties included, because copies are neighbours.

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``grow{times=2}``::

        %e, %g = route %l {top_k=4} : i32[…, choice=4], f32[…, choice=4]    # of 16 experts

    After ``grow{times=2 chosen=same}``, where a bias keeps every second copy from being chosen::

        %e, %g = route %l, %b {top_k=2 using=(bias)} : i32[…, choice=2], f32[…, choice=2]
    """

    name: ClassVar[str] = "grow"
    summary: ClassVar[str] = "store every expert several times, and choose as many more"
    must_match: ClassVar[bool] = True

    times: Annotated[int, "how often every expert is stored"] = 2
    chosen: Annotated[
        Literal["all", "same"],
        "how many a token goes to: as many more; or the same, and a bias keeps the copies from "
        "being chosen until training raises it",
    ] = "all"
    bias: Annotated[Wanted, f"chosen=same: {WANTED}"] = "auto"

    @property
    def preserves(self) -> Preserves:
        """The same function, for any router."""
        return Preserves("reassociation")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        found = [] if self.times >= 2 else [
            Problem("nothing grows", "times", "2 or more", str(self.times))
        ]  # fmt: skip
        if self.bias != "auto" and self.chosen == "all":
            what = "no bias is needed where all copies are chosen"
            found.append(Problem(what, "bias", "auto", self.bias, "chosen=same"))
        return found

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Grow every routed layer.

        Raises:
          InputError: gates or slots of a layer do not allow it; all problems at once.
        """
        layers = anatomies(graph)
        problems = [problem for layer in layers for problem in self._problems(layer)]
        if problems:
            raise InputError(problems)
        for layer in layers:
            if not may_rewrite(self.name, layer.name):
                break
            grown = self._more_chosen if self.chosen == "all" else self._same_chosen
            grown(graph, layer, ctx)
            made = layer.experts * self.times
            ctx.remark(Remark(layer.name, f"{layer.experts} experts became {made}"))
        missing = [] if layers else [NOTHING_ROUTED]
        return PassResult(bool(layers), len(layers), {"layers": len(layers)}, near_misses=missing)

    def _more_chosen(self, graph: Graph, layer: Anatomy, ctx: Context) -> None:
        # Copies share a probability, and have a sigmoid each.
        sums = convention(layer.attrs.gates)
        shared = sums.renormalised or sums.score == "softmax"
        factor = 1.0 if shared else 1 / self.times
        bias = layer.bias_factor(self.times)
        resize(graph, layer, self._copies, layer.attrs.top_k * self.times, factor, bias)

    def _same_chosen(self, graph: Graph, layer: Anatomy, ctx: Context) -> None:
        layer, param, value = with_bias(graph, layer, ctx, self.bias)
        copies = [n for n in range(layer.experts * self.times) if n % self.times]
        dormant = Dormant(copies, param, value, zero=False)
        bias = layer.bias_factor(self.times)
        resize(graph, layer, self._copies, layer.attrs.top_k, bias_factor=bias, dormant=dormant)

    def _copies(self, parts: list[Expr]) -> list[Expr]:
        return [part for part in parts for _ in range(self.times)]

    def _problems(self, layer: Anatomy) -> Iterator[Problem]:
        if self.chosen == "same":
            problem = not_dormant(layer, self.bias)
            yield from [] if problem is None else [problem]
            return
        row = convention(layer.attrs.gates)
        if row.max_top_k is not None or not row.equal_for_equal_logits:
            yield Problem(f"{row.name} gates do not divide among copies", layer.name)
        if layer.layer.assignment.slots != "ragged":
            yield Problem("copies drop other choices than one expert did", layer.name,
                          "slots=ragged", f"slots={layer.layer.assignment.slots}",
                          "specialize{dropless=true} removes the capacity")  # fmt: skip
