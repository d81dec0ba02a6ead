"""Small passes that the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir import F32, Builder, Graph, tensor
from moecc.rewrite import NearMiss, P, Rule, rewrite
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.pipeline import Registry


class IdlePass(Pass):
    """The base of passes that do nothing."""

    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Do nothing."""
        return PassResult(changed=False)


@dataclass(frozen=True)
class EveryKindPass(IdlePass):
    """Options of every kind."""

    name: ClassVar[str] = "every-kind"
    summary: ClassVar[str] = "have options of every kind"

    count: Annotated[int, "how many"]
    share: float = 0.5
    flag: bool = False
    on: bool = True
    word: str = "all"
    kind: Literal["copy", "noise", "drop-half"] = "copy"
    numbers: tuple[int, ...] = ()
    words: tuple[str, ...] = ("a",)
    pair: tuple[int, float] = (1, 2.0)
    maybe: int | None = None
    maybe_word: str | None = None
    auto: Literal["auto"] | float = "auto"
    layers: tuple[int, ...] | str = "all"


@dataclass(frozen=True)
class TopPass(IdlePass):
    """Options that may contradict each other."""

    name: ClassVar[str] = "top"
    summary: ClassVar[str] = "choose the best"

    experts: int = 8
    top_k: int = 2

    def validate(self) -> list[Problem]:
        """Refuse more choices than there are experts, and odd numbers of them."""
        problems = []
        if self.top_k > self.experts:
            problems.append(Problem("more choices than experts", "top-k", hint="experts=16"))
        if self.experts % 2:
            problems.append(Problem("an odd number of experts"))
        return problems


@dataclass(frozen=True)
class UnNegPass(Pass):
    """Remove pairs of negations."""

    name: ClassVar[str] = "un-neg"
    summary: ClassVar[str] = "remove pairs of negations"
    must_match: ClassVar[bool] = True
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Apply the one rule."""
        ctx.remark(Remark("here", "looked around"))
        rule = Rule("pair", P.neg(P.neg(P.any("x"))), lambda m, _: m.value("x"))
        result = PassResult.of(rewrite(graph, [rule], origin=self.name))
        result.remarks.append(Remark("here", "looked around"))
        return result


@dataclass(frozen=True)
class ScalePass(Pass):
    """Multiply the first output, and promise whatever the options say."""

    name: ClassVar[str] = "scale-output"
    summary: ClassVar[str] = "multiply the first output"

    by: float = 1.5
    promise: Literal["exact", "reassociation", "approximate"] = "approximate"
    predicted: float | None = None

    @property
    def preserves(self) -> Preserves:
        """What the option says."""
        return Preserves(self.promise, f"times {self.by:g}", self.predicted)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Multiply the first output."""
        name, value = next(iter(graph.outputs.items()))
        b = Builder(graph, origin=f"{self.name}/scale")
        graph.set_output(name, b.scale(value, by=self.by))
        return PassResult(changed=True, matched=1)


@dataclass(frozen=True)
class BadPass(Pass):
    """Go wrong in one of several ways."""

    name: ClassVar[str] = "bad"
    summary: ClassVar[str] = "go wrong"
    must_match: ClassVar[bool] = True
    preserves = EXACT

    way: Literal["crash", "refuse", "break", "nothing", "miss"] = "crash"

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Go wrong."""
        if self.way == "crash":
            raise KeyError("layers.7")
        if self.way == "refuse":
            raise InputError("not with this graph")
        if self.way == "break":
            value = next(iter(graph)).result
            value.type = value.type.with_axes(())
            return PassResult(changed=True, matched=1)
        misses = [
            NearMiss("ffn", f"%y{i} = contract @layers.{i}", f"reason {i}", i) for i in range(7)
        ]
        return PassResult(changed=False, near_misses=misses if self.way == "miss" else [])


PASSES = (EveryKindPass, TopPass, UnNegPass, ScalePass, BadPass)

REGISTRY = Registry({}, {}).extended({c.name: lambda c=c: c for c in PASSES}, "the tests")


def negations(count: int = 4) -> Graph:
    """Return a graph that negates its input `count` times, after a silu."""
    graph = Graph("negations")
    b = Builder(graph, loc="layers.0")
    value = b.silu(graph.input("x", tensor(F32, batch="B", embed=4)))
    for _ in range(count):
        value = b.neg(value)
    graph.set_output("y", value)
    return graph
