"""The `Pass` base class: a frozen dataclass whose fields are its options, with a checked promise.

A subclass sets `name`, `summary` and `preserves`, and writes `apply`.  Each field is an option of
the pipeline string, ``top_k`` as ``top-k``; its type is one of int, float, bool, str, a Literal, a
tuple of these, or a union of these and None; ``Annotated[int, "what it means"]`` documents it.
The docstring shows the graph before and after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from moecc.errors import Problem
from moecc.ir.graph import Graph
from moecc.rewrite.driver import RewriteResult, RuleStats
from moecc.rewrite.match import NearMiss
from moecc.rewrite.rule import PreservesKind
from moecc.types.arrays import Array
from moecc.weights.expr import Expr


class ReadWeight(Protocol):
    """Reads small parameters from the checkpoint of the model, where there is one."""

    def __call__(self, weight: Expr) -> Array | None:
        """Return the value of a weight expression, or None where it cannot be read."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model's values over texts, which `moecc capture` wrote.

    Attributes:
      texts: the names of the texts, in order.
      shapes: the shapes of the statistics by name; None where they are not to be looked at, as on a
        model at reduced sizes.
    """

    texts: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]] | None = None

    def problem(self, loc: str, wanted: Mapping[str, tuple[int, ...]]) -> Problem | None:
        """Return what is wrong with the statistics at a location, or None.

        Args:
          loc: the location, ``layers.3.ffn``.
          wanted: the shapes of the statistics that are needed, by their names there.
        """
        if self.shapes is None:
            return None
        for name, shape in wanted.items():
            found = self.shapes.get(f"{loc}.{name}")
            if found is None:
                return Problem(
                    f"the statistics have no {name} of this location",
                    loc,
                    hint="moecc capture --at takes those that its pattern fits",
                )
            if found != shape:
                return Problem(
                    f"the statistics have another shape: {name}",
                    loc,
                    str(list(shape)),
                    str(list(found)),
                )
        return None


NO_STATISTICS = Problem(
    "this needs statistics of the model",
    "--capture",
    hint="moecc capture MODEL --text FILE --out DIR takes them, convert --capture DIR reads them",
)
"""What is said where a method reads statistics and there are none."""


_ORDER: tuple[PreservesKind, ...] = ("exact", "reassociation", "approximate")


@dataclass(frozen=True)
class Preserves:
    """How a pass changes the function that the graph computes.

    Attributes:
      kind: ``exact`` (bit-identical in the reference), ``reassociation`` (equal in real
        arithmetic) or ``approximate``.
      reason: why it is not exact.
      predicted_error: the relative error to expect, where a formula gives it.
    """

    kind: PreservesKind
    reason: str = ""
    predicted_error: float | None = None

    def __str__(self) -> str:
        text = f"{self.kind}: {self.reason}" if self.reason else self.kind
        if self.predicted_error is None:
            return text
        return f"{text} (predicted relative error {self.predicted_error:.2g})"


EXACT = Preserves("exact")


def weakest(promises: Iterable[Preserves]) -> Preserves:
    """Return the combined promise of several passes in a row.

    The weakest kind, the reasons joined, and the predicted errors added up if every approximate
    pass predicts one.
    """
    some = list(promises)
    kind = max((p.kind for p in some), key=_ORDER.index, default=_ORDER[0])
    reasons = dict.fromkeys(p.reason for p in some if p.reason)
    errors = [p.predicted_error for p in some if p.kind == "approximate"]
    known = [e for e in errors if e is not None]
    total = sum(known) if known and len(known) == len(errors) else None
    return Preserves(kind, "; ".join(reasons), total)


@dataclass(frozen=True, slots=True)
class Remark:
    """A note of a pass on what it did or left undone: where, and what."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def _ignore(remark: Remark) -> None:
    """Drop a remark: the default of a context."""


def _no_weights(weight: Expr) -> Array | None:
    """Read nothing: the default of a context."""
    return None


@dataclass(frozen=True)
class Context:
    """The environment of a pass besides the graph.

    Attributes:
      seed: determines every random choice of the pipeline.
      allow_unmatched: whether a pass that must match may match nothing.
      remark: receives remarks as they arise.
      read: reads small parameters, such as the scale of a norm, where a promise depends on them.
      models: the names of the models beside the source whose weights may be read.
      statistics: what was captured of the model's values, if anything.
      promises: whether the promise of this very graph is wanted (`PassResult.preserves`); not where
        a graph is made to be looked at, since to estimate an error takes longer than to rewrite.
    """

    seed: int = 0
    allow_unmatched: bool = False
    remark: Callable[[Remark], None] = _ignore
    read: ReadWeight = _no_weights
    models: Sequence[str] = ()
    statistics: Statistics | None = None
    promises: bool = True


@dataclass
class PassResult:
    """The result of a pass.

    Attributes:
      changed: whether the graph differs from before.
      matched: the number of sites that the pass found to work on.
      stats: counts by name.
      remarks: remarks beyond those passed to the context already.
      near_misses: candidates that nearly matched, and why they did not.
      rules: statistics of the rewrite rules, by rule.
      preserves: what this application does to the function, if the graph decides more than
        the options do; None means the pass's declared promise.
    """

    changed: bool
    matched: int = 0
    stats: dict[str, int] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    rules: dict[str, RuleStats] = field(default_factory=dict)
    preserves: Preserves | None = None

    @classmethod
    def of(cls, done: RewriteResult) -> PassResult:
        """Return the result of a pass that only runs `moecc.rewrite.rewrite`."""
        stats = {name: rule.hits for name, rule in done.rules.items() if rule.hits}
        return cls(
            changed=done.rewrites > 0,
            matched=done.rewrites,
            stats=stats,
            near_misses=done.near_misses,
            rules=done.rules,
        )


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes.

    Attributes:
      name: kebab-case; the name in pipelines.
      summary: one line, without a full stop.
      must_match: whether it is an error if the pass finds nothing to work on.
      takes_rolled: whether it accepts a graph with repeated layers; other passes are rejected
        there, since they would not see the bodies.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    must_match: ClassVar[bool] = False
    takes_rolled: ClassVar[bool] = False

    @property
    @abstractmethod
    def preserves(self) -> Preserves:
        """The promise of the pass with these options."""

    @abstractmethod
    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite `graph` in place; it is valid before and after, not always in between.

        Raises:
          InputError: the pass cannot be applied to this graph.
        """

    def validate(self) -> list[Problem]:
        """Return the problems of the options alone, independent of the graph.

        A problem's ``where`` may name the option concerned, by its name in the text.
        """
        return []

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with the passes before this one, independent of the graph.

        Args:
          earlier: the passes that run before it, in order.
        """
        return []

    def warnings(self) -> list[Problem]:
        """Return warnings of options that are allowed but rarely intended."""
        return []

    def measure(self, before: Graph, after: Graph, seed: int) -> float | None:
        """Return how far `after` is from what is promised of it, relative to its outputs.

        For a pass whose graph is called otherwise than before, so that outputs for the same inputs
        say nothing; None, the default, compares those.

        Args:
          before: the graph that the pass was applied to.
          after: what it made of it.
          seed: of random data.
        """
        return None

    def lints(self) -> list[Problem]:
        """Return what a design guide advises against, with its source (`moecc.pipeline.lints`)."""
        return []
