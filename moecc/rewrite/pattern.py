"""Patterns: the shape of a subgraph, written as operation calls.

``P.neg(P.neg(P.any("x")))`` matches a value that is negated twice, and captures it as ``x``.  A
pattern describes how a value is computed, so it is written from its root, the last node, backwards
through operands.  A name that occurs twice must denote the same value both times.  Operands of a
commutative operation are tried both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import EllipsisType

from moecc.errors import UsageError, nearest
from moecc.ir.ops import OpDef, op

Where = Callable[[object], bool]
"""A predicate of a value or of an attribute."""

Heads = frozenset[OpDef | None]
"""The operations that may define a value; None stands for an input or a parameter."""


class Pattern:
    """Base of all patterns of a value."""

    def __or__(self, other: Pattern) -> OneOf:
        """Return a pattern that matches where either does; this one is tried first."""
        return OneOf((*_choices(self), *_choices(other)))

    @property
    def heads(self) -> Heads | None:
        """The operations that may define the matched value, or None: any."""
        return None

    @property
    def depth(self) -> int:
        """The number of nodes on the longest path from the root to a leaf."""
        return 0


@dataclass(frozen=True, eq=False)
class Leaf(Pattern):
    """Any value, whatever defines it.

    Attributes:
      kind: ``value``, ``param`` or ``input``.
      name: the name of the capture; None captures nothing.
      where: a predicate that must hold of the value.
      why: the reason if the predicate does not hold; completes a sentence that begins ``%x``.
    """

    kind: str = "value"
    name: str | None = None
    where: Where | None = None
    why: str = "is rejected by the pattern"

    @property
    def heads(self) -> Heads | None:
        """The operations that may define the matched value, or None: any."""
        return None if self.kind == "value" else frozenset({None})


@dataclass(frozen=True, eq=False)
class AttrPattern:
    """An attribute, captured and perhaps restricted by a predicate."""

    name: str | None = None
    where: Where | None = None
    why: str = "is rejected by the pattern"


@dataclass(frozen=True, eq=False)
class OpPattern(Pattern):
    """A node of one of several operations.

    Attributes:
      ops: the operations.
      operands: patterns of its operands, in order.
      attrs: names of attributes, each with a literal or an `AttrPattern`.
      rest: whether more operands may follow.
      name: the name that captures the node and its value.
      alone: whether nothing outside the match may use the value.
      index: the number of the node's result that is the value.
      where: a predicate of the value.
      why: the reason if the predicate does not hold.
      commutative: whether the operands may be exchanged.
    """

    ops: frozenset[OpDef]
    operands: tuple[Pattern, ...]
    attrs: tuple[tuple[str, object], ...] = ()
    rest: bool = False
    name: str | None = None
    alone: bool = False
    index: int = 0
    where: Where | None = None
    why: str = "is rejected by the pattern"
    commutative: bool = False

    def named(self, name: str) -> OpPattern:
        """Capture the node, and its value, as `name`."""
        return replace(self, name=name)

    def only_used_here(self) -> OpPattern:
        """Match only where every user of the value is itself part of the match."""
        return replace(self, alone=True)

    def result(self, index: int) -> OpPattern:
        """Match result `index` of a node that has several; without this, the first."""
        return replace(self, index=index)

    def such_that(self, where: Where, why: str) -> OpPattern:
        """Match only where `where` holds of the value; `why` completes the sentence if not."""
        return replace(self, where=where, why=why)

    @property
    def heads(self) -> Heads | None:
        """The operations that may define the matched value."""
        return self.ops

    @property
    def depth(self) -> int:
        """The number of nodes on the longest path from the root to a leaf."""
        return 1 + max((p.depth for p in self.operands), default=0)

    @property
    def label(self) -> str:
        """The description of the operations in messages."""
        return " or ".join(sorted(o.name for o in self.ops))


@dataclass(frozen=True, eq=False)
class OneOf(Pattern):
    """The first of several patterns that matches."""

    choices: tuple[Pattern, ...]

    @property
    def heads(self) -> Heads | None:
        """The operations that may define the matched value, or None: any."""
        heads: set[OpDef | None] = set()
        for choice in self.choices:
            some = choice.heads
            if some is None:
                return None
            heads |= some
        return frozenset(heads)

    @property
    def depth(self) -> int:
        """The number of nodes on the longest path from the root to a leaf."""
        return max(p.depth for p in self.choices)


def _choices(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.choices if isinstance(pattern, OneOf) else (pattern,)


def roots(pattern: Pattern) -> tuple[OpPattern, ...]:
    """Return the operation patterns that may be the root of a rule's pattern.

    Raises:
      UsageError: the root may also be a value that no operation defines.
    """
    found = _choices(pattern)
    if not all(isinstance(p, OpPattern) for p in found):
        raise UsageError("a rule's pattern begins with an operation", hint="P.add(…), not P.any(…)")
    return tuple(p for p in found if isinstance(p, OpPattern))


class Patterns:
    """Makes patterns: every operation of the table is a method; see `P`."""

    def any(
        self, name: str | None = None, *, where: Where | None = None, why: str = Leaf.why
    ) -> Leaf:
        """Return a pattern of any value."""
        return Leaf("value", name, where, why)

    def param(
        self, name: str | None = None, *, where: Where | None = None, why: str = Leaf.why
    ) -> Leaf:
        """Return a pattern of a parameter."""
        return Leaf("param", name, where, why)

    def input(
        self, name: str | None = None, *, where: Where | None = None, why: str = Leaf.why
    ) -> Leaf:
        """Return a pattern of an input of the graph."""
        return Leaf("input", name, where, why)

    def attr(
        self, name: str | None = None, *, where: Where | None = None, why: str = Leaf.why
    ) -> AttrPattern:
        """Return a pattern of an attribute, which captures it as `name`."""
        return AttrPattern(name, where, why)

    def op(
        self, names: str | Iterable[str], *operands: Pattern | EllipsisType, **attrs: object
    ) -> OpPattern:
        """Return a pattern of a node of any of the operations `names`.

        Args:
          names: one name or several.
          operands: their patterns; ``...`` at the end allows more.
          attrs: literals, predicates, or results of `attr`; attributes not named are unrestricted.

        Raises:
          UsageError: an operation has no such attribute, or another number of operands.
          InputError: there is no such operation.
        """
        entries = [op(n) for n in ([names] if isinstance(names, str) else names)]
        rest = bool(operands) and operands[-1] is ...
        given = tuple(p for p in operands if isinstance(p, Pattern))
        if len(given) + rest != len(operands):
            raise UsageError(f"operands of a pattern of {entries[0]} are patterns")
        for entry in entries:
            _check(entry, len(given), rest, attrs)
        commutative = all(e.commutative for e in entries)
        if commutative and rest:
            # So that the one operand pattern is tried on both sides.
            given, rest = (*given, Leaf(), Leaf())[:2], False
        return OpPattern(
            frozenset(entries),
            given,
            tuple((n, _attr(entries[0], n, v)) for n, v in attrs.items()),
            rest=rest,
            commutative=commutative,
        )

    def __getattr__(self, name: str) -> Callable[..., OpPattern]:
        if name.startswith("_"):
            raise AttributeError(name)
        entry = op(name)

        def make(*operands: Pattern | EllipsisType, **attrs: object) -> OpPattern:
            return self.op(entry.name, *operands, **attrs)

        return make


def _check(entry: OpDef, count: int, rest: bool, attrs: dict[str, object]) -> None:
    least = len(entry.operands)
    if (count > least and not entry.variadic) or (count < least and not rest):
        raise UsageError(
            f"a pattern of {entry.name} has other operands",
            expected=f"{least} ({', '.join(entry.operands)})",
            found=str(count),
            hint="... at the end allows further operands",
        )
    for name in attrs:
        if name not in entry.attrs:
            raise UsageError(
                f"{entry.name} has no attribute {name!r}", hint=nearest(name, entry.attrs)
            )


def _attr(entry: OpDef, name: str, value: object) -> object:
    if callable(value):
        return AttrPattern(where=value)
    # As in the builder, one axis needs no tuple.
    if isinstance(value, str) and entry.attrs[name].kind in ("axes", "words"):
        return (value,)
    return value


P = Patterns()
"""The pattern constructors: ``P.add(P.any("a"), P.param("b"))``."""
