"""Proofs that two graphs are the same function, for all inputs, weights and open sizes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from typing import Literal, NamedTuple

from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.mesh import mesh_of
from moecc.ir.ops.repetition import repetitions
from moecc.ir.traits import RowMove
from moecc.prove.counterexample import (
    Counterexample,
    find_counterexample,
    find_device_gap,
)
from moecc.prove.decoding import ASSUMPTIONS as STEP_ASSUMPTIONS
from moecc.prove.decoding import is_step, step_gap
from moecc.prove.evaluation import Evaluation, Terms, shown
from moecc.prove.log import log_of
from moecc.prove.mesh import Devices, Parting
from moecc.prove.parts import ASSUMPTIONS as PART_ASSUMPTIONS
from moecc.prove.parts import part_count, part_gap
from moecc.prove.rules import Lemmas
from moecc.support.process import gc_paused
from moecc.support.untyped import JsonDict
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Polynomial, TooManyTerms, Var
from moecc.types import Extent, TensorType

Status = Literal["proved", "refuted", "unknown"]

ASSUMPTIONS = (
    "arithmetic is that of real numbers",
    "every value is finite, but for what a mask hides",
    "no divisor is 0",
    "every open size is at least 1, and the types of both graphs hold",
    "constants are the rational numbers that their floats are",
)
FRACTIONS = (
    "constants are the simplest fractions, or roots of fractions, that round to their floats"
)
ON_DEVICES = (
    "open sizes divide into equal shards, and tokens into equal groups",
    "integers that pick rows of a table are below their number",
)
"""What the proof of a graph on a mesh rests on besides."""
EXACT_ON_DEVICES = "sums over devices are those of real numbers"

EXACT_ASSUMPTIONS = (
    "an operation returns the same bits for the same operands",
    "every open size is at least 1, and the types of both graphs hold",
)


@dataclass(frozen=True)
class Verdict:
    """What a proof of two graphs came to.

    Attributes:
      status: ``proved``, ``refuted`` by a counterexample, or ``unknown``.
      node: where the graphs part, as messages name it; empty if they do not.
      terms: the terms that differ there, of the first graph and of the second.
      lemmas: how often each lemma was used, for all graphs that were evaluated by then.
      assumptions: what the proof rests on besides.
      counterexample: for ``refuted``, the data on which outputs differ.
      make_log: makes the log.
    """

    status: Status
    node: str = ""
    terms: tuple[str, str] = ("", "")
    lemmas: dict[str, int] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ASSUMPTIONS
    counterexample: Counterexample | None = None
    make_log: Callable[[], JsonDict] = field(default=dict, repr=False, compare=False)

    @cached_property
    def log(self) -> JsonDict:
        """The steps of the proof, as ``docs/proof-log.md`` defines them; empty without a proof.

        It is made when it is first read, from the graphs as they are then.
        """
        return self.make_log()

    def __bool__(self) -> bool:
        return self.status == "proved"


def prove(before: Graph, after: Graph, *, exact: bool = False, refute: bool = True) -> Verdict:
    """Return whether two graphs have the same outputs for all inputs, weights and open sizes.

    Args:
      before: a graph.
      after: the graph to compare with it.
      exact: whether outputs must have the same bits in the reference interpreter.
      refute: whether a counterexample is searched where there is no proof.
    """
    return Prover(exact=exact).prove(before, after, refute=refute)


class Prover:
    """Proves pairs of graphs, each of which is evaluated once; none may change in between.

    Attributes:
      exact: whether outputs must have the same bits in the reference interpreter.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self._made: dict[Reading, tuple[Lemmas, Evaluation]] = {}
        self._devices = Devices()

    def prove(
        self,
        before: Graph,
        after: Graph,
        *,
        outputs: Collection[str] | None = None,
        refute: bool = True,
    ) -> Verdict:
        """Return whether two graphs have the same outputs.

        Args:
          before: a graph.
          after: the graph to compare with it.
          outputs: those to compare; None for all, which both must have.
          refute: whether a counterexample is searched where there is no proof.
        """
        if not self.exact and {*(outputs or ())} <= {*after.outputs}:
            verdict = _verdict_on_part(before, after)
            if verdict is not None:
                return verdict
        parting: Parting | None = None
        counterexample: Counterexample | None = None
        counts: dict[str, int] = {}
        for reading in _readings(before, after, exact=self.exact):
            if parting is not None and reading.fractions and refute:
                counterexample = self._counterexample(before, after, parting)
                refute = False
            if counterexample is not None:
                break
            with _deep_and_uncollected():
                lemmas, evaluation = self._reading(reading)
                try:
                    gap = _parting(evaluation, before, after, outputs)
                except (TooManyTerms, RecursionError) as error:
                    # What is half built stays unused: another proof begins anew.
                    del self._made[reading]
                    gap = "the graphs", (f"too large to compare: {error}", "")
            if gap is None:
                names = before.outputs if outputs is None else outputs
                parted = self._on_devices(before, after, evaluation, refute)
                # A verdict that is no proof is false.
                if parted is not None:
                    return parted
                return self._proved(before, after, names, reading)
            if not reading.fractions:
                parting, counts = gap, dict(sorted(lemmas.counts.items()))
        assert parting is not None
        if self.exact and refute:
            counterexample = self._counterexample(before, after, parting)
        status: Status = "unknown" if counterexample is None else "refuted"
        node, terms = parting
        return Verdict(status, node, terms, counts, counterexample=counterexample)

    def _on_devices(
        self, before: Graph, after: Graph, evaluation: Evaluation, refute: bool
    ) -> Verdict | None:
        """Return the verdict on equal graphs where devices are not proved to compute them."""
        # Only here: what tests use of the prover imports it.
        from moecc.testing.oracle import moved_values

        for graph in (before, after):
            with _deep_and_uncollected():
                values = evaluation.evaluate(graph)
                infinite = {v for v, tensor in values.items() if not tensor.finite}
                try:
                    parting = self._devices.parting(graph, infinite)
                except (TooManyTerms, RecursionError) as error:
                    self._devices = Devices()
                    parting = "devices", (f"too large to compare: {error}", "")
            moved = next(moved_values(before, after), "") if graph is after else ""
            if parting is None and not moved:
                continue
            gap = find_device_gap(before, graph) if refute else None
            node, terms = parting or ("devices", ("what the graph means", moved))
            if gap is None:
                return Verdict("unknown", node, terms)
            return Verdict("refuted", node, terms, counterexample=gap[1])
        return None

    def _proved(
        self, before: Graph, after: Graph, outputs: Collection[str], reading: Reading
    ) -> Verdict:
        lemmas, evaluation = self._reading(reading)
        assumptions = EXACT_ASSUMPTIONS if self.exact else ASSUMPTIONS
        if reading.fractions:
            assumptions = (*assumptions[:-1], FRACTIONS)
        counts = Counter(lemmas.counts)
        is_on_mesh = mesh_of(before) is not None or mesh_of(after) is not None
        if is_on_mesh:
            assumptions = (*assumptions, *ON_DEVICES)
            if self.exact:
                assumptions = (*assumptions, EXACT_ON_DEVICES)
            counts += self._devices.lemmas.counts
        make_log = partial(
            log_of,
            before,
            after,
            lemmas.steps,
            evaluation.algebra,
            exact=self.exact,
            rolled=reading.rolled,
            fractions=reading.fractions,
            outputs=tuple(outputs),
            devices=self._devices if is_on_mesh else None,
        )
        sorted_counts = dict(sorted(counts.items()))
        return Verdict("proved", lemmas=sorted_counts, assumptions=assumptions, make_log=make_log)

    def _counterexample(
        self, before: Graph, after: Graph, parting: Parting
    ) -> Counterexample | None:
        if parting[0].split()[0] in ("inputs", "outputs", "input", "output"):
            return None
        return find_counterexample(before, after, exact=self.exact)

    def _reading(self, reading: Reading) -> tuple[Lemmas, Evaluation]:
        if reading not in self._made:
            lemmas = Lemmas(self.exact)
            algebra = Algebra(lemmas, fractions=reading.fractions)
            evaluation = Evaluation(algebra, exact=self.exact, rolled=reading.rolled)
            self._made[reading] = lemmas, evaluation
        return self._made[reading]


def _verdict_on_part(before: Graph, after: Graph) -> Verdict | None:
    """Return the verdict on a graph that computes a part of another; None where it is none."""
    parts = part_count(before, after)
    assumptions: tuple[str, ...] = STEP_ASSUMPTIONS
    if is_step(before, after):
        gap = step_gap(before, after)
    elif parts > 1:
        with _deep_and_uncollected():
            gap = part_gap(before, after, parts)
        assumptions = (*ASSUMPTIONS[:-1], *ON_DEVICES, *PART_ASSUMPTIONS)
    else:
        return None
    if gap is None:
        return Verdict("proved", assumptions=assumptions)
    return Verdict("unknown", *gap)


class Reading(NamedTuple):
    """How graphs are read.

    Attributes:
      rolled: whether repetition is a function of its body, and not run after run.
      fractions: whether constants are the simplest numbers that their floats are to 15 digits.
    """

    rolled: bool
    fractions: bool


MOST_NODES = 100_000
"""Graphs that have more nodes unrolled are compared rolled alone."""


def _readings(before: Graph, after: Graph, *, exact: bool) -> Iterator[Reading]:
    """Yield the readings to try: constants as they are before fractions, bodies before runs."""
    scans = [n for g in (before, after) for n in g if n.body is not None]
    nodes = sum(repetitions(n.attrs)[1] * len(n.body) for n in scans if n.body is not None)
    for fractions in (False,) if exact else (False, True):
        if scans:
            yield Reading(True, fractions)
        if nodes <= MOST_NODES:
            yield Reading(False, fractions)


@contextmanager
def _deep_and_uncollected() -> Iterator[None]:
    """Let terms nest, and leave the cyclic collector off: terms have no cycles."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20_000))
    try:
        with gc_paused():
            yield
    finally:
        sys.setrecursionlimit(limit)


def _parting(
    evaluation: Evaluation, before: Graph, after: Graph, outputs: Collection[str] | None
) -> Parting | None:
    """Return where two graphs part, and the terms there; None if they are proved equal."""
    old_outputs, new_outputs = before.outputs, after.outputs
    if outputs is not None:
        old_outputs, new_outputs = (
            {name: value for name, value in graph.outputs.items() if name in outputs}
            for graph in (before, after)
        )
    gap = _signature_gap("input", before.inputs, after.inputs)
    gap = gap or _signature_gap("output", old_outputs, new_outputs)
    if gap is not None:
        return gap
    old, new = evaluation.evaluate(before), evaluation.evaluate(after)
    for name, value in old_outputs.items():
        a, b = old[value], new[new_outputs[name]]
        if not is_same(a, b):
            return _first_difference(value, new_outputs[name], old, new)
    return None


def is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same element at the same indices of the same axes."""
    return a.axes == b.axes and a.body is b.body


def _signature_gap(kind: str, old: Mapping[str, Value], new: Mapping[str, Value]) -> Parting | None:
    if old.keys() != new.keys():
        return f"{kind}s", (", ".join(old), ", ".join(new))
    for name, value in old.items():
        types = (_layout(value.type), _layout(new[name].type))
        if types[0] != types[1]:
            return f"{kind} %{name}", types
    return None


def _layout(type: TensorType) -> str:
    sizes = (a.size.kind if isinstance(a.size, Extent) else a.size for a in type.axes)
    axes = ", ".join(f"{a.name}={s}" for a, s in zip(type.axes, sizes, strict=True))
    return f"{type.dtype}[{axes}]"


def _first_difference(before: Value, after: Value, old: Terms, new: Terms) -> Parting:
    """Return the first node of the second graph that stands for another value of the first.

    Both graphs are walked side by side from an output, as far as their operations agree and their
    values do not.  What the second graph computes and the first does not, as rows and their
    experts, has no value to be compared with, and the walk ends behind it.
    """
    values = {(frozenset(t.axes), t.body) for t in old.values()}
    twins: dict[Value, Value] = {after: before}
    stack = [(before, after)]
    while stack:
        a, b = stack.pop()
        for x, y in _operands_in_step(a.node, b.node):
            is_lost = (frozenset(new[y].axes), new[y].body) not in values
            is_lost = is_lost and not _is_alike(old[x], new[y])
            if is_lost and y.node is not None and y not in twins:
                twins[y] = x
                stack.append((x, y))
    results = (v for node in after.graph for v in node.results)
    first = next((v for v in results if v in twins), after)
    twin, named = twins[first], _first_lost_row(first, old, new) or first
    node_text = where(named.node) if named.node is not None else f"%{named.name}"
    return node_text, (shown(old[twin]), shown(new[named]))


def _is_alike(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal at the start of axes of two sizes, up to a factor."""
    if a.names != b.names or a.axes == b.axes:
        return False
    pairs = zip(a.axes, b.axes, strict=True)
    start = {v.name: a.algebra.zero for v, w in pairs if v is not w}
    parts = (t.moved(t.without(*start), start) for t in (a, b))
    return len({_up_to_a_factor(part) for part in parts}) == 1


def _first_lost_row(combined: Value, old: Terms, new: Terms) -> Value | None:
    """Return the first of the rows that are combined which no token has in the first graph.

    The row of a token's best choice is compared with values of the token, as where experts are
    copies of a block, and with such rows of the first graph.  None where rows have other axes than
    these, as slices of neurons, or all are there.
    """
    node = combined.node
    if node is None or node.op.moves is not RowMove.TO_TOKENS or len(node.operands) < 4:
        return None
    slot = new[node.operands[0]].axis("slot")
    best = {_best_expert(t) for t in old.values() if t.slots is not None}
    if best and any(_best_expert(new[v]) not in best for v in node.operands if new[v].slots):
        return None
    values = {_up_to_a_factor(t) for t in _by_token(old).values()}
    layouts = {axes for axes, _ in values}
    rows, upstream = _by_token(new), {*node.operands}
    for earlier in reversed(list(combined.graph)):
        if not upstream.isdisjoint(earlier.results):
            upstream.update(earlier.operands)
    for value in (v for n in combined.graph for v in n.results if v in upstream):
        is_moved = value.node is None or value.node.op.moves is not None
        if slot in new[value].axes and not is_moved:
            key = _up_to_a_factor(rows[value])
            if key not in values:
                return value if key[0] in layouts else None
    return None


def _best_expert(tensor: Tensor) -> Polynomial | None:
    """Return the expert of the first choice, for slots."""
    slots, algebra = tensor.slots, tensor.algebra
    if slots is None:
        return None
    return algebra.substitute(slots.experts, {slots.choice: algebra.zero})


def _by_token(terms: Terms) -> Terms:
    """Return values as functions of tokens: of rows, that of the token's first choice."""
    assignments = {t.slots.sizes: t.slots for t in terms.values() if t.slots is not None}
    values: Terms = {}
    for value, tensor in terms.items():
        sizes = tuple(v.size for v in tensor.axes if v.name in ("group", "expert", "slot"))
        slots = assignments.get(sizes) if tensor.has("slot") else None  # type: ignore[arg-type]
        if slots is not None:
            place = slots.place(tensor.algebra, tensor.algebra.zero)
            axes = (*slots.tokens, *tensor.without(*place))
            tensor = tensor.moved(axes, place)
        values[value] = tensor
    return values


def _up_to_a_factor(tensor: Tensor) -> tuple[frozenset[Var], Polynomial]:
    """Return the axes and the element of a tensor, without the number that it is multiplied by."""
    body = tensor.body
    if len(body.terms) == 1:
        body = tensor.algebra.scale(body, 1 / Fraction(body.terms[0][1]))
    return frozenset(tensor.axes), body


def _operands_in_step(before: Node | None, after: Node | None) -> Iterable[tuple[Value, Value]]:
    """Return the operands of two nodes in pairs, none where they are not of one operation."""
    if before is None or after is None or before.op is not after.op:
        return ()
    if before.attrs != after.attrs or len(before.operands) != len(after.operands):
        return ()
    return zip(before.operands, after.operands, strict=True)
