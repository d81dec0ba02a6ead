"""The rewrite driver: applies rules wherever they match, until none does.

A worklist starts with every node in order and grows by the nodes that a rewrite may have enabled:
the new nodes, the users of replaced values, and the remaining users of values that lost one.  So
the work is linear in the graph and the rewrites.  Rules that undo each other would never terminate;
a bound proportional to the graph stops them, and the error names the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from time import perf_counter

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.operation import OpDef
from moecc.ir.structure import replace_value
from moecc.ir.text import format_node
from moecc.rewrite.pattern import Heads, Match, Misses, NearMiss, OpPattern, Rule, match, roots
from moecc.support.process import gc_paused

REWRITES_PER_NODE = 16
"""The number of rewrites per node of the graph beyond which the driver reports a loop."""


@dataclass
class RewriteWatch:
    """Counts rewrites, whichever pass makes them, and stops after some: to find a wrong one.

    Attributes:
      limit: how many are made; None for all.
      done: how many have been made.
      last: the last one: pass and rule, and the line that it replaced.
    """

    limit: int | None
    done: int = 0
    last: str = ""

    @property
    def is_spent(self) -> bool:
        """Whether no more rewrites are to be made."""
        return self.limit is not None and self.done >= self.limit

    def note(self, origin: str, root: Node | str) -> None:
        """Count a rewrite, before it is made."""
        self.done += 1
        self.last = f"{origin} at {root if isinstance(root, str) else format_node(root)}"


_watch: ContextVar[RewriteWatch | None] = ContextVar("rewrite watch", default=None)


@contextmanager
def rewrites_watched(limit: int | None) -> Iterator[RewriteWatch]:
    """Watch all rewrites made inside, and make at most `limit` of them."""
    watch = RewriteWatch(limit)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def may_rewrite(origin: str, root: Node | str) -> bool:
    """Whether a pass that does not rewrite by rules may make its next change, which is counted.

    It always may, unless `rewrites_watched` looks for the change that is wrong.

    Args:
      origin: the name of the pass.
      root: what is changed: a node, or where in the model it is.
    """
    watch = _watch.get()
    if watch is None:
        return True
    if watch.is_spent:
        return False
    watch.note(origin, root)
    return True


class RewriteLimitError(InputError):
    """Rules that rewrite without end."""


@dataclass
class RuleStats:
    """The statistics of a rule: nodes tried, rewrites made, and the time of both in seconds."""

    attempts: int = 0
    hits: int = 0
    seconds: float = 0.0


@dataclass
class RewriteResult:
    """The result of the driver.

    Attributes:
      rewrites: how many rewrites it made.
      rules: statistics by rule.
      near_misses: the nearest miss of each rule, even if it matched elsewhere.
    """

    rewrites: int = 0
    rules: dict[str, RuleStats] = field(default_factory=dict)
    near_misses: list[NearMiss] = field(default_factory=list)


def rewrite(
    graph: Graph, rules: Sequence[Rule], *, origin: str, limit: int | None = None
) -> RewriteResult:
    """Apply `rules` to `graph`, in place, until none matches.

    At a node the first rule that matches wins.  Nodes that a rewrite leaves without users are
    erased; parameters are not.  Nodes that were unused before stay as they are.

    Args:
      graph: changed in place.
      rules: in order of preference.
      origin: the name of the pass.
      limit: the most rewrites allowed; by default in proportion to the graph.

    Raises:
      RewriteLimitError: the limit was exceeded.
    """
    with gc_paused():
        return _Driver(graph, rules, origin, limit).run()


def find(graph: Graph, *rules: Rule, misses: Misses | None = None) -> Iterator[Match]:
    """Yield the matches of `rules`, checked, in one walk, without rewriting anything.

    At a node, each of the rules that match yields one match, in their order.
    """
    index = _by_operation(rules, {rule.name: RuleStats() for rule in rules})
    for node in graph:
        matched = None
        for candidate in index.get(node.op, ()):
            if candidate.rule is matched:
                continue
            hit = candidate.find(node, misses)
            if hit is not None:
                matched = candidate.rule
                yield hit


class _RootPattern:
    """A rule with one of the operation patterns that may be its root."""

    __slots__ = ("heads", "name", "pattern", "rule", "stats")

    def __init__(self, rule: Rule, pattern: OpPattern, stats: RuleStats) -> None:
        self.rule = rule
        self.name = rule.name
        self.pattern = pattern
        self.stats = stats
        heads = [(i, p.heads) for i, p in enumerate(pattern.operands)]
        self.heads: tuple[tuple[int, Heads], ...] = tuple((i, h) for i, h in heads if h is not None)

    def rejects(self, node: Node) -> bool:
        """Whether the operations that define the operands already rule out a match."""
        operands = node.operands
        if len(operands) < len(self.pattern.operands):
            return True
        if self.pattern.commutative:
            operations = [v.node.op if v.node is not None else None for v in operands]
            return any(operations[0] not in h and operations[1] not in h for _, h in self.heads)
        for i, heads in self.heads:
            maker = operands[i].node
            if (maker.op if maker is not None else None) not in heads:
                return True
        return False

    def find(self, node: Node, misses: Misses | None) -> Match | None:
        """Return a match that the rule's check accepts, or None, and record a near miss."""
        if self.rejects(node):
            # The matcher records the reason once; a rule that fails everywhere must not be silent.
            if misses is not None and misses.beats(self.name, 1):
                match(self.pattern, node, misses, self.name)
            return None
        matched = match(self.pattern, node, misses, self.name)
        if matched is None:
            return None
        reason: object = self.rule.check(matched)
        if reason is None:
            return matched
        if not isinstance(reason, str):
            kind = type(reason).__name__
            raise TypeError(f"the check of {self.name} returns a {kind}, expected a reason or None")
        if misses is not None:
            misses.note(self.name, node, reason, len(matched.nodes) + 1)
        return None


def _by_operation(
    rules: Sequence[Rule], stats: Mapping[str, RuleStats]
) -> dict[OpDef, list[_RootPattern]]:
    """Return the candidates for a node by its operation, those of one rule in a row."""
    index: dict[OpDef, list[_RootPattern]] = {}
    for rule in rules:
        for pattern in roots(rule.pattern):
            candidate = _RootPattern(rule, pattern, stats[rule.name])
            for op in pattern.ops:
                index.setdefault(op, []).append(candidate)
    return index


class _RecordingBuilder(Builder):
    """A builder that records the nodes it creates."""

    def __init__(self, graph: Graph, *, loc: str, origin: str, before: Node) -> None:
        super().__init__(graph, loc=loc, origin=origin, before=before)
        self.made: list[Node] = []

    def node(
        self, op: str, /, *operands: Value, names: tuple[str, ...] = (), **attrs: object
    ) -> Node:
        node = super().node(op, *operands, names=names, **attrs)
        self.made.append(node)
        return node


class _Driver:
    def __init__(self, graph: Graph, rules: Sequence[Rule], origin: str, limit: int | None) -> None:
        self.graph = graph
        self.origin = origin
        self.limit = 100 + REWRITES_PER_NODE * len(graph) if limit is None else limit
        self.result = RewriteResult(rules={r.name: RuleStats() for r in rules})
        self.misses = Misses()
        self.index = _by_operation(rules, self.result.rules)
        self.watch = _watch.get()
        self.reach = max([1, *(p.depth - 1 for r in rules for p in roots(r.pattern))])
        self.recent: Counter[str] = Counter()
        # A stack whose top is the first node, so that the graph is walked in order.
        self.stack = [node for node in graph.walk_back() if node.op in self.index]
        self.queued = set(self.stack)

    def run(self) -> RewriteResult:
        while self.stack and not (self.watch is not None and self.watch.is_spent):
            node = self.stack.pop()
            self.queued.discard(node)
            # Dead nodes are left to dead-code elimination; rewriting them has no effect.
            if node.alive and not node.is_dead:
                self.visit(node)
        self.result.near_misses = list(self.misses.best.values())
        return self.result

    def visit(self, node: Node) -> None:
        for candidate in self.index[node.op]:
            stats = candidate.stats
            stats.attempts += 1
            start = perf_counter()
            matched = candidate.find(node, self.misses)
            if matched is not None:
                self.apply(candidate.rule, matched)
                stats.hits += 1
            stats.seconds += perf_counter() - start
            if matched is not None:
                return

    def apply(self, rule: Rule, matched: Match) -> None:
        self.count(rule, matched)
        root = matched.root
        origin = f"{self.origin}/{rule.name}"
        if self.watch is not None:
            self.watch.note(origin, root)
        builder = _RecordingBuilder(self.graph, loc=root.loc, origin=origin, before=root)
        try:
            built = rule.build(matched, builder)
        except InputError as error:
            place = f"{origin} at {where(root)}"
            raise type(error)(
                replace(p, where=f"{place}, {p.where}" if p.where else place)
                for p in error.problems
            ).with_traceback(error.__traceback__) from None
        values = built if isinstance(built, tuple) else (built,)
        _check_values(origin, root, values, builder.made)
        users = [user for old in root.results for user in old.users]
        new_nodes = set(builder.made)
        pairs = list(zip(root.results, values, strict=True))
        names = [(new, old.name) for old, new in pairs if new.node in new_nodes]
        for old, new in pairs:
            replace_value(old, new)
        self.erase_dead([*matched.nodes, *builder.made])
        for new, name in names:
            # A replacement takes over the name of the value, so that the text differs less.
            if new.name in self.graph and name not in self.graph:
                self.graph.rename(new, name)
        self.enqueue_users(users)
        for node in reversed(builder.made):
            self.enqueue(node)

    def count(self, rule: Rule, matched: Match) -> None:
        self.result.rewrites += 1
        if self.result.rewrites > self.limit * 3 // 4:
            self.recent[rule.name] += 1
        if self.result.rewrites <= self.limit:
            return
        name, hint = f"{self.origin}/{rule.name}", "a rule undoes another"
        keep = ", ".join(f"{self.origin}/{n} ({c} times)" for n, c in self.recent.most_common(4))
        fault = f"rules that keep firing: {keep}"
        if matched.root.origin == name:
            fault = f"{name} matches {where(matched.root)}, which it built itself"
            hint = "let the rule's check reject what its build returns"
        raise RewriteLimitError(
            f"{self.origin}: rewriting does not terminate",
            where=matched.root.loc or None,
            expected=f"at most {self.limit} rewrites of {len(self.graph)} nodes",
            found=fault,
            hint=hint,
        )

    def erase_dead(self, nodes: Iterable[Node]) -> None:
        """Erase the unused nodes among `nodes`, and what only they used."""
        left = list(nodes)
        while left:
            node = left.pop()
            if not node.alive or not node.is_dead:
                continue
            operands = list(dict.fromkeys(node.operands))
            node.erase()
            for value in operands:
                if value.node is not None:
                    left.append(value.node)
                if len(value.users) == 1:
                    self.enqueue_users(value.users)

    def enqueue(self, node: Node) -> None:
        if node.alive and node.op in self.index and node not in self.queued:
            self.stack.append(node)
            self.queued.add(node)

    def enqueue_users(self, users: Iterable[Node]) -> None:
        """Enqueue `users` and their users, up to the depth of the deepest pattern."""
        level = list(dict.fromkeys(users))
        for _ in range(self.reach):
            for node in level:
                self.enqueue(node)
            level = list(dict.fromkeys(u for n in level for v in n.results for u in v.users))


def _check_values(
    origin: str, root: Node, values: tuple[object, ...], new_nodes: Sequence[Node]
) -> None:
    """Raise ValueError unless `values` can replace the results of `root`: a bug of the rule."""
    if any(node in value.users for value in root.results for node in new_nodes):
        raise ValueError(f"{origin} uses the results of {where(root)}, which it replaces")
    if len(values) != len(root.results):
        raise ValueError(
            f"{origin} returns {len(values)} values for the {len(root.results)} of {where(root)}"
        )
    for old, new in zip(root.results, values, strict=True):
        if not isinstance(new, Value):
            kind = type(new).__name__
            raise ValueError(f"{origin} returns a {kind}, expected a Value: of a node, its result")
        if new.node is root:
            raise ValueError(f"{origin} returns a result of the node that it replaces, %{new.name}")
        if new.type != old.type:
            raise ValueError(f"{origin} replaces {old!r} by {new!r}, which is of another type")
