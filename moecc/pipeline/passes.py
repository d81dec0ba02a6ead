"""What a pass is: a frozen dataclass whose fields are its options, and a promise that is checked.

A subclass sets `name`, `summary` and `preserves`, and writes `apply`.  Each field is an option of
the pipeline string, ``top_k`` as ``top-k``; its type is one of int, float, bool, str, a Literal, a
tuple of these, or a union of these and None; ``Annotated[int, "what it means"]`` documents it.
The docstring shows the graph before and after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moecc.errors import Problem
from moecc.ir.graph import Graph
from moecc.rewrite.driver import RewriteResult, RuleStats
from moecc.rewrite.match import NearMiss
from moecc.rewrite.rule import PreservesKind

_ORDER: tuple[PreservesKind, ...] = ("exact", "reassociation", "approximate")


@dataclass(frozen=True)
class Preserves:
    """What a pass does to the function.

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
    """Return what several passes in a row preserve.

    The weakest kind, the reasons joined, and the predicted errors added where each pass that is
    approximate predicts one.
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
    """Something worth telling that a pass did or left: where, and what."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def _ignore(remark: Remark) -> None:
    """Drop a remark: what a context does with them unless it is told otherwise."""


@dataclass(frozen=True)
class Context:
    """What a pass is given besides the graph.

    Attributes:
      seed: fixes every random choice of the pipeline.
      allow_unmatched: whether a pass that must match may match nothing.
      remark: takes remarks as they arise.
    """

    seed: int = 0
    allow_unmatched: bool = False
    remark: Callable[[Remark], None] = _ignore


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
      changed: whether the graph says something else than before.
      matched: how many places the pass found to work on.
      stats: counts by name.
      remarks: what is worth telling, beyond what the context was told already.
      near_misses: what nearly matched, and why it did not.
      rules: statistics of the rewrite rules, by rule.
      preserves: what this application does to the function, where the graph decides more than
        the options could; None means what the pass declares.
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
        """Return the result of a pass that does nothing but `moecc.rewrite.rewrite`."""
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
      name: kebab-case; what pipelines call it.
      summary: one line, without a full stop.
      must_match: whether it is an error that the pass finds nothing to work on.
      takes_rolled: whether it works on a graph that repeats layers; others are refused there, since
        they would see none of what is repeated.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    must_match: ClassVar[bool] = False
    takes_rolled: ClassVar[bool] = False

    @property
    @abstractmethod
    def preserves(self) -> Preserves:
        """What the pass, with these options, does to the function."""

    @abstractmethod
    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite `graph` in place; it is valid before and after, not always in between.

        Raises:
          InputError: the pass cannot do its work on this graph.
        """

    def validate(self) -> list[Problem]:
        """Return what is wrong with the options by themselves, whatever the graph.

        A problem's ``where`` may name the option that it is about, as the text spells it.
        """
        return []

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return what the options contradict in the passes before this one, whatever the graph.

        Args:
          earlier: the passes that run before it, in their order.
        """
        return []

    def warnings(self) -> list[Problem]:
        """Return what is allowed, and yet hardly what anyone wants; told when a text is read."""
        return []
