"""The passes on single experts of a finished mixture: append-expert, exchange-expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from moecc.errors import Problem
from moecc.ir.graph import Graph
from moecc.rewrite.passes import Bounds, Context, Preserves
from moecc.support.lazy import np
from moecc.support.text import amount
from moecc.weights.arithmetic import BASE, read_from
from moecc.weights.expr import Expr
from moecc_passes.resize.layer import (
    BIAS_DOC,
    Anatomy,
    BiasChoice,
    Dormant,
    members,
    not_dormant,
    resize,
    statistic,
    unread,
    with_bias,
)
from moecc_passes.resize.passes import ResizePass, missing_experts, promise_of_dormant
from moecc_passes.upcycle.options import unknown_models

_SOURCE_DOC = "model that the expert is read from: base, the source itself, or one of --experts"


@dataclass(frozen=True)
class AppendExpertPass(ResizePass):
    """Append experts of this or another model, which a bias keeps from being chosen at first.

    Their rows of the router come with them.  Training, or an edit of the bias, lets tokens choose
    them.  With ``by=saliency``, the most useful experts of each layer are copied, and not all alike
    (after Expert Upcycling, 2604.19835): each copy is of the expert with the most for each of its
    copies.

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``append-expert{source=a source-expert=3}``::

        %e, %g = route %l, %b {top_k=2 using=(bias)} : …    # of 9 experts, %b is -2 of the last

    A copy with halved gates would not be exact: a token that chose the expert would choose both
    copies, and lose its last choice.
    """

    name = "append-expert"
    summary = "append experts, which a bias keeps from being chosen"

    count: Annotated[int, "number of experts that are appended", Bounds(1)] = 1
    source: Annotated[str, _SOURCE_DOC] = BASE
    source_expert: Annotated[int, "number of the expert in its model", Bounds(0)] = 0
    by: Annotated[
        Literal["number", "saliency", "share"],
        "which are appended: that of source-expert; or, from convert --capture, those with the "
        "most saliency (mean of gate times norm of the result), or share of the choices",
    ] = "number"
    bias: Annotated[BiasChoice, BIAS_DOC] = "auto"

    @property
    def preserves(self) -> Preserves:
        """The same function, for any router; `promise` refines it where a bias weighs already."""
        return Preserves("reassociation")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        problems = super().validate()
        if self.by != "number" and (self.source, self.source_expert) != (BASE, 0):
            message = "the experts are chosen among those of the model itself"
            options = f"source={self.source} source-expert={self.source_expert}"
            problems.append(Problem(message, "by", "by=number", options))
        return problems

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot have experts that are never chosen, or these ones."""
        yield from unknown_models([self.source], ctx.models, "source")
        if self.by == "number":
            yield from missing_experts(layer, (self.source_expert,))
        else:
            yield from unread(layer, f"experts.{self.by}", ctx)
        yield from not_dormant(layer, self.bias)

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """A bias is added to probabilities, which more experts make smaller."""
        is_copy = self.source == BASE
        return promise_of_dormant(layer, ctx, self.bias, self.count, are_copies=is_copy)

    def _numbers(self, layer: Anatomy, ctx: Context) -> list[int]:
        """Return the numbers of the experts to append, in order."""
        if self.by == "number":
            return [self.source_expert] * self.count
        values = statistic(layer, f"experts.{self.by}", ctx)
        if values is None:  # on reduced sizes, where any experts do
            values = np.ones(layer.experts)
        copies, numbers = np.ones(layer.experts), []
        for _ in range(self.count):
            numbers.append(int(np.argmax(values / copies)))
            copies[numbers[-1]] += 1
        return numbers

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Append the experts."""
        numbers, old = self._numbers(layer, ctx), layer.experts
        layer, param, value = with_bias(graph, layer, ctx, self.bias)
        total = old + self.count
        resize(
            graph,
            layer,
            lambda parts: [*parts, *(read_from(parts[n], self.source) for n in numbers)],
            layer.attrs.top_k,
            bias_factor=layer.bias_factor(total / old),
            dormant=Dormant(range(old, total), param, value, zero=False),
        )
        text = ", ".join(map(str, numbers))
        return f"{amount(self.count, 'expert')} appended: {text} of {self.source}"


@dataclass(frozen=True)
class ExchangeExpertPass(ResizePass):
    """Replace one expert by an expert of this or another model.

    Its row of the router comes with it.  All other tensors stay as they are, bit for bit, so that
    exchanging it back gives the very model.  A layer's result changes for tokens that chose the
    old expert, or choose the new one.

    Before::

        param %w : f32[expert=2, mlp=4, embed=4] = stack(source("0.w" : …), source("1.w" : …), …)

    After ``exchange-expert{expert=1 source=a}``::

        param %w : f32[expert=2, mlp=4, embed=4] = stack(source("0.w" : …), source("a:1.w" : …), …)
    """

    name = "exchange-expert"
    summary = "replace one expert by an expert of this or another model"

    expert: Annotated[int, "number of the expert that is replaced", Bounds(0)] = 0
    source: Annotated[str, _SOURCE_DOC] = BASE
    source_expert: Annotated[
        int | None, "number of the expert in its model; none: the same number", Bounds(0)
    ] = None

    @property
    def preserves(self) -> Preserves:
        """The promise for experts that differ; `promise` refines it where they are copies."""
        return Preserves("approximate", "tokens that choose the expert get the result of another")

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot have this expert."""
        yield from unknown_models([self.source], ctx.models, "source")
        yield from missing_experts(layer, tuple(dict.fromkeys((self.expert, self._number))))

    @property
    def _number(self) -> int:
        return self.expert if self.source_expert is None else self.source_expert

    def _exchanged(self, parts: list[Expr]) -> list[Expr]:
        """Return the weights of the experts with the new expert among them."""
        parts = list(parts)
        parts[self.expert] = read_from(parts[self._number], self.source)
        return parts

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """Return ``exact`` where the new expert has the very weights of the old one."""
        weights = map(members, layer.params)
        is_same = all(self._exchanged(parts) == parts for parts in weights)
        return Preserves("exact") if is_same else self.preserves

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Replace the expert."""
        resize(graph, layer, self._exchanged, layer.attrs.top_k)
        return f"expert {self.expert} is expert {self._number} of {self.source}"
