"""Match a pattern at a node, and report near misses.

The matcher works through an agenda of (pattern, value) pairs; where there is a choice (operands of
a commutative operation, alternatives) it records the alternative and backtracks on failure, so
that every combination is tried and none needs a rule of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from moecc.ir.graph import Node, Value
from moecc.ir.verify import where
from moecc.rewrite.pattern import AttrPattern, Leaf, OneOf, OpPattern, Pattern


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
        value = self.captures[name]
        assert isinstance(value, Value), f"{name!r} captures an attribute"
        return value

    def node(self, name: str) -> Node:
        """Return the node captured as `name`."""
        node = self.value(name).node
        assert node is not None, f"{name!r} captures a value that no node defines"
        return node

    def attr(self, name: str) -> Any:
        """Return the attribute captured as `name`."""
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
        known = self.best.get(rule)
        return known is None or score > known.score

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
            found = match(choice, node)
            if found is not None:
                return found
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
        pattern, value, rest = todo
        if isinstance(pattern, OpPattern):
            return self.enter(pattern, value, rest)
        if isinstance(pattern, OneOf):
            for other in reversed(pattern.choices[1:]):
                self.remember((other, value, rest))
            return (pattern.choices[0], value, rest)
        assert isinstance(pattern, Leaf)
        if (pattern.kind == "param" and not value.is_param) or (
            pattern.kind == "input" and (value.is_param or value.node is not None)
        ):
            self.failure = (pattern, value, "kind")
        elif pattern.where is not None and not pattern.where(value):
            self.failure = (pattern, value, "where")
        elif pattern.name is not None and not self.bind(pattern.name, value):
            self.failure = (pattern, value, "bind")
        return rest

    def enter(self, pattern: OpPattern, value: Value, rest: _Todo | None) -> _Todo | None:
        node = value.node
        why = ""
        if node is None or node.op not in pattern.ops:
            why = "op"
        elif value.index != pattern.index:
            why = "index"
        elif len(node.operands) != len(pattern.operands) and (
            not pattern.rest or len(node.operands) < len(pattern.operands)
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
            self.remember((p, b, (q, a, rest)))
            return (p, a, (q, b, rest))
        for i in range(len(pattern.operands) - 1, -1, -1):
            rest = (pattern.operands[i], node.operands[i], rest)
        return rest

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
            assert isinstance(pattern, Leaf)
            wanted = {"param": "a parameter", "input": "an input of the graph"}[pattern.kind]
            return f"{_made(value)}, expected {wanted}"
        if why == "where":
            assert isinstance(pattern, Leaf | OpPattern)
            return f"%{value.name} {pattern.why}"
        if why == "bind":
            assert isinstance(pattern, Leaf | OpPattern)
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
            have, place = node.attrs[name], f"attribute {name!r} of %{node.results[0].name}"
            if not isinstance(wanted, AttrPattern):
                if have != wanted:
                    return f"{place} is {have!r}, expected {wanted!r}"
            elif wanted.where is not None and not wanted.where(have):
                return f"{place}, {have!r}, {wanted.why}"
            elif wanted.name is not None and self.captures.get(wanted.name, have) != have:
                return f"{place} is {have!r}, expected {self.captures[wanted.name]!r} as elsewhere"
        raise AssertionError("every attribute matches")


_NOWHERE = Leaf()


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
