"""The pass ``prune``: some of the experts are removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.driver import may_rewrite
from moecc.weights.draws import derive_key
from moecc.weights.expr import Expr
from moecc_passes.resize.layer import (
    Anatomy,
    anatomies,
    expert_numbers,
    largest,
    resize,
    statistic,
    unread,
)
from moecc_passes.routed import NOTHING_ROUTED


@dataclass(frozen=True)
class PrunePass(Pass):
    """Keep some experts of every routed layer, with their rows of the router.

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``prune{keep=6}``::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 6 experts

    A token that chose none of the others has the result that it had, under renormalised gates.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "remove some of the experts"
    must_match: ClassVar[bool] = True

    keep: Annotated[int, "how many experts of a layer stay"] = 4
    experts: Annotated[
        str, "which: numbers 0,2,5 for all layers; empty: as by says, for each layer"
    ] = ""
    by: Annotated[
        Literal["draw", "saliency", "share"],
        "which stay: drawn by the seed; or, from convert --capture, those of the largest mean of "
        "gate times norm of the result (REAP), or that most choices went to",
    ] = "draw"

    @property
    def preserves(self) -> Preserves:
        """What is lost depends on how often the others were chosen."""
        return Preserves("approximate", "tokens that chose an expert that is gone choose others")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        found = [] if self.keep >= 2 else [
            Problem("one expert is no mixture", "keep", "2 or more", str(self.keep), "to-dense")
        ]  # fmt: skip
        numbers = expert_numbers(self.experts)
        if isinstance(numbers, Problem):
            return [*found, numbers]
        if numbers and self.by != "draw":
            found.append(Problem("the experts are listed", "by", "the default", self.by))
        if numbers and len(numbers) != self.keep:
            found.append(Problem("another number of experts is listed", "experts",
                                 f"{self.keep} numbers", f"{len(numbers)}"))  # fmt: skip
        return found

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Prune every routed layer.

        Raises:
          InputError: a layer has too few experts; all problems at once.
        """
        layers = anatomies(graph)
        problems = [problem for layer in layers for problem in self._problems(layer, ctx)]
        if problems:
            raise InputError(list(dict.fromkeys(problems)))
        for layer in layers:
            if not may_rewrite(self.name, layer.name):
                break
            kept = self._kept(layer, ctx)

            def chosen(parts: list[Expr], kept: tuple[int, ...] = kept) -> list[Expr]:
                return [parts[number] for number in kept]

            resize(graph, layer, chosen, layer.attrs.top_k)
            ctx.remark(Remark(layer.name, f"kept experts {', '.join(map(str, kept))}"))
        missing = [] if layers else [NOTHING_ROUTED]
        return PassResult(bool(layers), len(layers), {"layers": len(layers)}, near_misses=missing)

    def _kept(self, layer: Anatomy, ctx: Context) -> tuple[int, ...]:
        numbers = expert_numbers(self.experts)
        assert not isinstance(numbers, Problem), "validated"
        if numbers:
            return numbers
        values = None if self.by == "draw" else statistic(layer, f"experts.{self.by}", ctx)
        if values is not None:
            return largest(values, self.keep)
        key = derive_key(ctx.seed, f"{layer.name}/prune")
        drawn = np.random.default_rng(key).permutation(layer.experts)[: self.keep]
        return tuple(sorted(int(number) for number in drawn))

    def _problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        if self.by != "draw":
            yield from unread(layer, f"experts.{self.by}", ctx)
        numbers = expert_numbers(self.experts)
        assert not isinstance(numbers, Problem), "validated"
        top_k = layer.attrs.top_k
        if not top_k <= self.keep <= layer.experts:
            yield Problem("a layer cannot keep that many experts", layer.name,
                          f"top-k {top_k} to {layer.experts}", f"keep={self.keep}")  # fmt: skip
        beyond = [number for number in numbers if number >= layer.experts]
        if beyond:
            yield Problem("there are no such experts", layer.name, f"0 to {layer.experts - 1}",
                          ", ".join(map(str, beyond)))  # fmt: skip
