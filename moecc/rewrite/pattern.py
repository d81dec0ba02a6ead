"""Patterns: the shape of a subgraph, written as operation calls.

``P.neg(P.neg(P.any("x")))`` matches a value that is negated twice, and captures it as ``x``.  A
pattern describes how a value is computed, so it is written from its root, the last node, backwards
through operands.  A name that occurs twice must denote the same value both times.  Operands of a
commutative operation are tried both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Literal, TypeAlias, get_args

from moecc.errors import UnknownName, UsageError, nearest, unknown_name
from moecc.ir.builder import Builder
from moecc.ir.graph import Node, Value, where
from moecc.ir.operation import OpDef, op

Where = Callable[[object], bool]
"""A predicate of a value or of an attribute."""

Heads = frozenset[OpDef | None]
"""The operations that may define a value; None stands for an input or a parameter."""


class Pattern:
    """Base of all patterns of a value."""

    def __or__(self, alternative: Pattern) -> OneOf:
        """Return a pattern that matches where either does; this one is tried first."""
        return OneOf((*_choices(self), *_choices(alternative)))

    @property
    def heads(self) -> Heads | None:
        """The operations that may define the matched value, or None: any."""
        return None

    @property
    def depth(self) -> int:
        """The number of nodes on the longest path from the root to a leaf."""
        return 0


@dataclass(frozen=True, eq=False)
class LeafPattern(Pattern):
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
      is_open: whether more operands may follow.
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
    is_open: bool = False
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
    choices = _choices(pattern)
    if not all(isinstance(p, OpPattern) for p in choices):
        raise UsageError("a rule's pattern begins with an operation", hint="P.add(…), not P.any(…)")
    return tuple(p for p in choices if isinstance(p, OpPattern))


class Patterns:
    """Makes patterns: every operation of the table is a method; see `P`."""

    def any(
        self, name: str | None = None, *, where: Where | None = None, why: str = LeafPattern.why
    ) -> LeafPattern:
        """Return a pattern of any value."""
        return LeafPattern("value", name, where, why)

    def param(
        self, name: str | None = None, *, where: Where | None = None, why: str = LeafPattern.why
    ) -> LeafPattern:
        """Return a pattern of a parameter."""
        return LeafPattern("param", name, where, why)

    def input(
        self, name: str | None = None, *, where: Where | None = None, why: str = LeafPattern.why
    ) -> LeafPattern:
        """Return a pattern of an input of the graph."""
        return LeafPattern("input", name, where, why)

    def attr(
        self, name: str | None = None, *, where: Where | None = None, why: str = LeafPattern.why
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
        is_open = bool(operands) and operands[-1] is ...
        patterns = tuple(p for p in operands if isinstance(p, Pattern))
        if len(patterns) + is_open != len(operands):
            raise UsageError(f"operands of a pattern of {entries[0]} are patterns")
        for entry in entries:
            _check(entry, len(patterns), is_open, attrs)
        commutative = all(e.commutative for e in entries)
        if commutative and is_open:
            # So that the one operand pattern is tried on both sides.
            patterns, is_open = (*patterns, LeafPattern(), LeafPattern())[:2], False
        return OpPattern(
            frozenset(entries),
            patterns,
            tuple((n, _attr(entries[0], n, v)) for n, v in attrs.items()),
            is_open=is_open,
            commutative=commutative,
        )

    def __getattr__(self, name: str) -> Callable[..., OpPattern]:
        if name.startswith("_"):
            raise AttributeError(name)
        entry = op(name)

        def make(*operands: Pattern | EllipsisType, **attrs: object) -> OpPattern:
            return self.op(entry.name, *operands, **attrs)

        return make


def _check(entry: OpDef, count: int, is_open: bool, attrs: dict[str, object]) -> None:
    least = len(entry.operands)
    if (count > least and not entry.variadic) or (count < least and not is_open):
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


# Match a pattern at a node, and report near misses.
#
# The matcher works through an agenda of (pattern, value) pairs; where there is a choice (operands
# of a commutative operation, alternatives) it records the alternative and backtracks on failure, so
# that every combination is tried and none needs a rule of its own.


@dataclass(frozen=True, slots=True)
class Match:
    """A subgraph that a pattern matches.

    Attributes:
      root: the node at the root of the pattern.
      nodes: all nodes of the match, the root first.
      captures: values and attributes by their names in the pattern.
    """

    root: Node
    nodes: tuple[Node, ...]
    captures: Mapping[str, object]

    def value(self, name: str) -> Value:
        """Return the value captured as `name`."""
        value = self.attr(name)
        assert isinstance(value, Value), f"{name!r} captures an attribute"
        return value

    def node(self, name: str) -> Node:
        """Return the node captured as `name`."""
        node = self.value(name).node
        assert node is not None, f"{name!r} captures a value that no node defines"
        return node

    def attr(self, name: str) -> Any:
        """Return the attribute captured as `name`."""
        if name not in self.captures:
            raise UnknownName([unknown_name("capture", name, self.captures)])
        return self.captures[name]

    def __contains__(self, name: object) -> bool:
        return name in self.captures


@dataclass(frozen=True, slots=True)
class NearMiss:
    """The attempt of a rule that came nearest, and why it failed.

    Attributes:
      rule: the rule, or the name of the search.
      where: the node at which it was tried, with its location.
      reason: the mismatch.
      score: the number of nodes that matched.
    """

    rule: str
    where: str
    reason: str
    score: int = 0

    def __str__(self) -> str:
        return f"{self.rule}: not at {self.where}: {self.reason}"


@dataclass
class Misses:
    """The nearest miss of each rule; the first of equals."""

    best: dict[str, NearMiss] = field(default_factory=dict)

    def beats(self, rule: str, score: int) -> bool:
        """Whether a miss of `rule` with `score` nodes would be its nearest."""
        best = self.best.get(rule)
        return best is None or score > best.score

    def note(self, rule: str, root: Node, reason: str, score: int) -> None:
        """Record a miss, unless `rule` has one as near."""
        if self.beats(rule, score):
            self.best[rule] = NearMiss(rule, where(root), reason, score)


# The remaining agenda, as a linked list: pattern, value, and the rest.
_Todo: TypeAlias = "tuple[Pattern, Value, _Todo | None]"


def match(
    pattern: OpPattern, root: Node, misses: Misses | None = None, rule: str = ""
) -> Match | None:
    """Return the match of `pattern` at `root`, or None.

    Args:
      pattern: its root is an operation; see `moecc.rewrite.pattern.roots`.
      root: the node to start from.
      misses: where the nearest miss is recorded.
      rule: the name under which it is recorded.
    """
    attempt = _Attempt()
    todo: _Todo | None = (pattern, root.results[pattern.index], None)
    while True:
        if todo is None:
            if attempt.is_closed():
                return Match(root, tuple(attempt.nodes), attempt.captures)
        else:
            todo = attempt.step(todo)
            if attempt.failure is None:
                continue
        if misses is not None and misses.beats(rule, len(attempt.nodes)):
            misses.note(rule, root, attempt.explain(), len(attempt.nodes))
        if not attempt.choices:
            return None
        todo = attempt.back()


def fits(pattern: Pattern, node: Node | None) -> Match | None:
    """Return the match of `pattern`, or of its first alternative that matches, at `node`, or None.

    For callers that recognise a node without rewriting; None also if `node` is None.
    """
    if node is None:
        return None
    for choice in pattern.choices if isinstance(pattern, OneOf) else (pattern,):
        # Most nodes are another operation, so this quick check avoids an attempt.
        if isinstance(choice, OpPattern) and node.op in choice.ops:
            matched = match(choice, node)
            if matched is not None:
                return matched
    return None


class _Attempt:
    """The state of one call of `match`."""

    __slots__ = ("alone", "captures", "choices", "failure", "nodes", "trail")

    def __init__(self) -> None:
        self.captures: dict[str, object] = {}
        self.trail: list[str] = []
        self.nodes: list[Node] = []
        self.alone: list[Value] = []
        self.choices: list[tuple[_Todo, int, int, int]] = []
        self.failure: tuple[Pattern, Value, str] | None = None

    def step(self, todo: _Todo) -> _Todo | None:
        """Match the first pair of the agenda; return the rest, or set `failure`."""
        pattern, value, remaining = todo
        if isinstance(pattern, OpPattern):
            return self.enter(pattern, value, remaining)
        if isinstance(pattern, OneOf):
            for alternative in reversed(pattern.choices[1:]):
                self.remember((alternative, value, remaining))
            return (pattern.choices[0], value, remaining)
        assert isinstance(pattern, LeafPattern)
        if (pattern.kind == "param" and not value.is_param) or (
            pattern.kind == "input" and (value.is_param or value.node is not None)
        ):
            self.failure = (pattern, value, "kind")
        elif pattern.where is not None and not pattern.where(value):
            self.failure = (pattern, value, "where")
        elif pattern.name is not None and not self.bind(pattern.name, value):
            self.failure = (pattern, value, "bind")
        return remaining

    def enter(self, pattern: OpPattern, value: Value, remaining: _Todo | None) -> _Todo | None:
        node = value.node
        why = ""
        if node is None or node.op not in pattern.ops:
            why = "op"
        elif value.index != pattern.index:
            why = "index"
        elif len(node.operands) != len(pattern.operands) and (
            not pattern.is_open or len(node.operands) < len(pattern.operands)
        ):
            why = "arity"
        elif pattern.attrs and not self.attributes(pattern, node):
            why = "attrs"
        elif pattern.where is not None and not pattern.where(value):
            why = "where"
        elif pattern.name is not None and not self.bind(pattern.name, value):
            why = "bind"
        if why or node is None:
            self.failure = (pattern, value, why)
            return None
        self.nodes.append(node)
        if pattern.alone:
            self.alone.append(value)
        if pattern.commutative:
            (p, q), (a, b) = pattern.operands, node.operands
            self.remember((p, b, (q, a, remaining)))
            return (p, a, (q, b, remaining))
        for i in range(len(pattern.operands) - 1, -1, -1):
            remaining = (pattern.operands[i], node.operands[i], remaining)
        return remaining

    def attributes(self, pattern: OpPattern, node: Node) -> bool:
        for name, wanted in pattern.attrs:
            have = node.attrs[name]
            if not isinstance(wanted, AttrPattern):
                if have != wanted:
                    return False
                continue
            if wanted.where is not None and not wanted.where(have):
                return False
            if wanted.name is not None and not self.bind(wanted.name, have):
                return False
        return True

    def bind(self, name: str, thing: object) -> bool:
        if name in self.captures:
            return bool(self.captures[name] == thing)
        self.captures[name] = thing
        self.trail.append(name)
        return True

    def is_closed(self) -> bool:
        """Whether the values restricted to uses within the match are; otherwise set `failure`."""
        for value in self.alone:
            if any(user not in self.nodes for user in value.users):
                self.failure = (_NOWHERE, value, "alone")
                return False
        return True

    def remember(self, todo: _Todo) -> None:
        self.choices.append((todo, len(self.trail), len(self.nodes), len(self.alone)))

    def back(self) -> _Todo:
        """Backtrack to the last choice."""
        todo, names, nodes, alone = self.choices.pop()
        for name in self.trail[names:]:
            del self.captures[name]
        del self.trail[names:], self.nodes[nodes:], self.alone[alone:]
        self.failure = None
        return todo

    def explain(self) -> str:
        """Return the failure as a sentence."""
        assert self.failure is not None
        pattern, value, why = self.failure
        if why == "alone":
            return _other_user(value, self.nodes)
        if why == "kind":
            assert isinstance(pattern, LeafPattern)
            wanted = {"param": "a parameter", "input": "an input of the graph"}[pattern.kind]
            return f"{_made(value)}, expected {wanted}"
        if why == "where":
            assert isinstance(pattern, LeafPattern | OpPattern)
            return f"%{value.name} {pattern.why}"
        if why == "bind":
            assert isinstance(pattern, LeafPattern | OpPattern)
            bound = self.captures[pattern.name or ""]
            assert isinstance(bound, Value), "a name is of a value or of an attribute, not of both"
            return f"%{value.name} should be the same value as %{bound.name}"
        assert isinstance(pattern, OpPattern)
        if why == "op":
            return f"{_made(value)}, expected {pattern.label}"
        if why == "index":
            return f"%{value.name} is result {value.index} of its node, expected {pattern.index}"
        assert value.node is not None
        if why == "arity":
            count = len(value.node.operands)
            return f"{_made(value)} from {count} operands, expected {len(pattern.operands)}"
        return self._explain_attrs(pattern, value.node)

    def _explain_attrs(self, pattern: OpPattern, node: Node) -> str:
        for name, wanted in pattern.attrs:
            have, description = node.attrs[name], f"attribute {name!r} of %{node.results[0].name}"
            if not isinstance(wanted, AttrPattern):
                if have != wanted:
                    return f"{description} is {have!r}, expected {wanted!r}"
            elif wanted.where is not None and not wanted.where(have):
                return f"{description}, {have!r}, {wanted.why}"
            elif wanted.name is not None and self.captures.get(wanted.name, have) != have:
                bound = self.captures[wanted.name]
                return f"{description} is {have!r}, expected {bound!r} as elsewhere"
        raise AssertionError("every attribute matches")


_NOWHERE = LeafPattern()


def _made(value: Value) -> str:
    """Return how a value is defined, as the beginning of a sentence."""
    if value.node is None:
        return f"%{value.name} is {'a parameter' if value.is_param else 'an input'}"
    loc = f" @{value.node.loc}" if value.node.loc else ""
    return f"%{value.name} is defined by {value.node.op.name}{loc}"


def _other_user(value: Value, inside: list[Node]) -> str:
    outside = [user for user in value.users if user not in inside]
    if outside[0] is value.graph.terminator:
        return f"%{value.name} is also an output of the graph"
    return f"%{value.name} has {len(value.users)} users, one of them elsewhere: {where(outside[0])}"


# Rules: a pattern, a check that may reject with a reason, and the replacement to build.
#
# A rule keeps no state: whatever `build` needs, it reads from the match, as `check` did.

PreservesKind = Literal["exact", "reassociation", "approximate"]
PROMISES: tuple[PreservesKind, ...] = get_args(PreservesKind)
"""The promises of a rewrite, from the strongest to the weakest."""


def check_promise(kind: str) -> None:
    """Raise ValueError unless `kind` is a promise of a pass or a rule."""
    if kind not in PROMISES:
        hint = nearest(kind, PROMISES) or f"promises: {', '.join(PROMISES)}"
        raise ValueError(f"{kind!r} is no promise; {hint}")


Build = Callable[[Match, Builder], Value | tuple[Value, ...]]
Check = Callable[[Match], str | None]


def accept(match: Match) -> None:
    """Reject nothing: the check of a rule whose pattern is sufficient."""


@dataclass(frozen=True)
class Rule:
    """A rewrite.

    Attributes:
      name: kebab-case; new nodes have the origin ``pass/name``.
      pattern: the subgraph it applies to; its root is an operation.
      build: returns one replacement for each result of the root, of the same types.
      check: returns why a match is rejected, or None.
      preserves: its promise.
    """

    name: str
    pattern: Pattern
    build: Build
    check: Check = accept
    preserves: PreservesKind = "exact"

    def __post_init__(self) -> None:
        check_promise(self.preserves)
