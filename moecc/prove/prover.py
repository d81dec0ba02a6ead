"""Proofs that two graphs are the same function, for all inputs, weights and open sizes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import mesh_of
from moecc.ir.operation import OpDef
from moecc.ir.ops.repetition import repetitions
from moecc.prove.counterexample import (
    Counterexample,
    find_counterexample,
    find_device_gap,
)
from moecc.prove.decoding import ASSUMPTIONS as STEP_ASSUMPTIONS
from moecc.prove.decoding import is_step, step_gap
from moecc.prove.evaluation import Evaluation
from moecc.prove.localisation import first_difference
from moecc.prove.log import frozen_log, log_of, step_log
from moecc.prove.mesh import Devices, Parting
from moecc.prove.parts import ASSUMPTIONS as PART_ASSUMPTIONS
from moecc.prove.parts import part_count, prove_part
from moecc.prove.rules import Lemmas
from moecc.prove.stopped import without_frozen_gradients
from moecc.rewrite.passes import Pass
from moecc.support.process import gc_paused
from moecc.support.untyped import JsonDict
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, TooManyTerms
from moecc.types import Extent, TensorType

Status = Literal["proved", "refuted", "unknown"]

FINITE = "every value is finite, but for what a mask hides"
ASSUMPTIONS = (
    "arithmetic is that of real numbers",
    FINITE,
    "no divisor is 0",
    "no integer wraps around",
    "every open size is at least 1, and the types of both graphs hold",
    "constants are the rational numbers that their floats are",
)
FRACTIONS = (
    "constants are the simplest fractions, or roots of fractions, that round to their floats"
)
OF_TABLES = "integers that pick rows of a table are at least 0 and below their number"
"""Further assumption of the proof of a graph that looks rows up: a table may be cut or padded."""
OF_REGIONS = "regions of JAX of the same name, lines and operands are the same program"
"""Further assumption of the proof of graphs with regions that only their function computes."""
ON_DEVICES = ("open sizes divide into equal shards, and tokens into equal groups", OF_TABLES)
"""Further assumptions of the proof of a graph on a mesh."""
FROZEN = "frozen parameters have no gradient"
"""Further assumption where graphs are equal but for gradients of frozen parameters."""
EXACT_ON_DEVICES = "sums over devices are those of real numbers"

EXACT_ASSUMPTIONS = (
    "an operation returns the same bits for the same operands",
    "no integer wraps around",
    "every open size is at least 1, and the types of both graphs hold",
)


@dataclass(frozen=True)
class Verdict:
    """The verdict on two graphs.

    Attributes:
      status: ``proved``, ``refuted`` by a counterexample, or ``unknown``.
      node: where the graphs part, as messages name it; empty if they do not.
      terms: the terms that differ there, of the first graph and of the second.
      lemmas: how often each lemma was used, for all graphs that were evaluated by then.
      assumptions: further assumptions of the proof.
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
    """Proves pairs of graphs; each is evaluated once and must not change in between.

    Attributes:
      exact: whether outputs must have the same bits in the reference interpreter.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self._evaluations: dict[Reading, tuple[Lemmas, Evaluation]] = {}
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

        Raises:
          OwnOperationError: an operation of the user's own has not a trait that it declares.
        """
        # Only here: what tests use of the prover imports it.
        from moecc.testing.traits import check_traits, own_operations

        check_traits(before, after)
        verdict = self._prove(before, after, outputs, refute)
        rows = {op for op, _, _ in own_operations(before, after)}
        if not rows or not verdict:
            return verdict
        believed = tuple(sorted(map(_believed_of, rows)))
        return replace(verdict, assumptions=(*verdict.assumptions, *believed))

    def _prove(
        self, before: Graph, after: Graph, outputs: Collection[str] | None, refute: bool
    ) -> Verdict:
        held = without_frozen_gradients(before), without_frozen_gradients(after)
        if None in held:
            return self._verdict(before, after, outputs, refute)
        verdict = self._verdict(before, after, outputs, refute=False)
        if verdict.status == "proved":
            return verdict
        stopped_before, stopped_after = (graph for graph in held if graph is not None)
        verdict = self._verdict(stopped_before, stopped_after, outputs, refute)
        if verdict.status != "proved":
            return verdict
        assumptions = (*verdict.assumptions, FROZEN)
        return replace(
            verdict,
            assumptions=assumptions,
            make_log=lambda: frozen_log(verdict.log, before, after),
        )

    def _verdict(
        self, before: Graph, after: Graph, outputs: Collection[str] | None, refute: bool
    ) -> Verdict:
        if _has_empty_axis(before) or _has_empty_axis(after):
            # An empty mean has no value, and shares of nothing do not add up.
            return Verdict("unknown", "the graphs", ("no comparison: an axis without elements", ""))
        if not self.exact and {*(outputs or ())} <= {*after.outputs}:
            verdict = _verdict_on_part(before, after, outputs)
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
                    # Terms that are half built are not used again.
                    del self._evaluations[reading]
                    gap = "the graphs", (f"no comparison: too large: {error}", "")
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
        from moecc.testing.traits import own_operations

        for graph in (before, after):
            with _deep_and_uncollected():
                values = evaluation.evaluate(graph)
                infinite = {v for v, tensor in values.items() if not tensor.finite}
                try:
                    parting = self._devices.parting(graph, infinite)
                except (TooManyTerms, RecursionError) as error:
                    self._devices = Devices()
                    parting = "devices", (f"too large to compare: {error}", "")
            if parting is None and graph is after:
                changes = moved_values(before, after)
                parting = next(((name, (old, new)) for name, old, new in changes), None)
            if (
                parting is None
                and own_operations(graph)
                and find_device_gap(before, graph) is not None
            ):
                # How an operation is sharded is its author's word.
                parting = "devices", ("operations of the user's own, on shards", "")
            if parting is None:
                continue
            node, terms = parting
            gap = find_device_gap(before, graph) if refute else None
            status: Status = "unknown" if gap is None else "refuted"
            return Verdict(status, node, terms, counterexample=gap)
        return None

    def _proved(
        self, before: Graph, after: Graph, outputs: Collection[str], reading: Reading
    ) -> Verdict:
        lemmas, evaluation = self._reading(reading)
        assumptions = EXACT_ASSUMPTIONS if self.exact else ASSUMPTIONS
        if reading.fractions:
            assumptions = (*assumptions[:-1], FRACTIONS)
        if any(n.op.opaque for graph in (before, after) for n in _nodes(graph)):
            assumptions = (*assumptions, OF_REGIONS)
        counts = Counter(lemmas.counts)
        is_on_mesh = mesh_of(before) is not None or mesh_of(after) is not None
        if is_on_mesh:
            assumptions = (*assumptions, *ON_DEVICES)
            if self.exact:
                assumptions = (*assumptions, EXACT_ON_DEVICES)
            counts += self._devices.lemmas.counts
        elif not self.exact and (_looks_up(before) or _looks_up(after)):
            assumptions = (*assumptions, OF_TABLES)
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
        if reading not in self._evaluations:
            lemmas = Lemmas(self.exact)
            algebra = Algebra(lemmas, fractions=reading.fractions)
            evaluation = Evaluation(algebra, exact=self.exact, rolled=reading.rolled)
            self._evaluations[reading] = lemmas, evaluation
        return self._evaluations[reading]


def _believed_of(row: OpDef) -> str:
    """Return the assumption on an operation of the user's own, whose traits are only sampled."""
    file = Path((row.source or "").rpartition(":")[0]).name
    traits = [
        f"{row} ({file}) is a function of its operands",
        "element by element at any size" if row.elementwise else "",
        "in either order" if row.commutative and not row.elementwise else "",
        "and shards compute shards" if row.sharding is not None else "",
    ]
    return ", ".join(filter(None, traits))


def _nodes(graph: Graph) -> Iterator[Node]:
    """Yield the nodes of a graph and of its bodies."""
    for node in graph:
        yield from (node, *(node.body or ()))


def _has_empty_axis(graph: Graph) -> bool:
    """Return whether a value of a graph has an axis of no elements."""
    leaves = (*graph.inputs.values(), *graph.params.values())
    values = (*leaves, *(v for n in _nodes(graph) for v in n.results))
    return any(0 in v.type.sizes for v in values)


def _looks_up(graph: Graph) -> bool:
    """Return whether a graph picks rows of a table by integers that may be too large."""
    return any(n.op.index is not None and n.op.index.strict for n in _nodes(graph))


def _verdict_on_part(
    before: Graph, after: Graph, outputs: Collection[str] | None
) -> Verdict | None:
    """Return the verdict on a graph that computes a part of another; None where it is none."""
    if is_step(before, after):
        gap = step_gap(before, after)
        if gap is not None:
            return Verdict("unknown", *gap)
        make_log = partial(step_log, before, after)
        return Verdict("proved", assumptions=STEP_ASSUMPTIONS, make_log=make_log)
    parts = part_count(before, after)
    names = before.outputs.keys() ^ after.outputs.keys()
    is_lacking = any(not name.startswith("metric.") for name in names)
    if parts == 1 or (outputs is None and is_lacking):
        return None
    with _deep_and_uncollected():
        try:
            proof = prove_part(before, after, parts)
        except (TooManyTerms, RecursionError) as error:
            return Verdict("unknown", "the graphs", (f"too large to compare: {error}", ""))
    if proof.parting is not None:
        return Verdict("unknown", *proof.parting)
    counts = proof.lemmas.counts + proof.devices.lemmas.counts
    make_log = partial(
        log_of,
        before,
        after,
        proof.lemmas.steps,
        proof.evaluation.algebra,
        outputs=proof.outputs,
        devices=proof.devices,
        batch=proof.batch,
    )
    assumptions = (*ASSUMPTIONS, *ON_DEVICES, *PART_ASSUMPTIONS)
    lemmas = dict(sorted(counts.items()))
    return Verdict("proved", lemmas=lemmas, assumptions=assumptions, make_log=make_log)


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
    if gap is None and not old_outputs:
        gap = "outputs", (", ".join(before.outputs), ", ".join(after.outputs))
    if gap is not None:
        return gap
    old, new = evaluation.evaluate(before), evaluation.evaluate(after)
    for name, value in old_outputs.items():
        a, b = old[value], new[new_outputs[name]]
        if not is_same(a, b):
            return first_difference(name, (value, new_outputs[name]), old, new)
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


Evidence = Literal["proved", "sampled", "none"]
"""The evidence for a promise: a proof for all inputs, drawn data, or nothing."""


def evidence(item: Pass, graph: Graph, seeds: Sequence[int] = (0,)) -> Evidence:
    """Prove that the pass preserves the function as it promises, or check it on drawn data.

    Args:
      item: the pass.
      graph: stays as it is.
      seeds: of the drawn data.

    Returns:
      ``proved`` for all inputs, weights and open sizes; ``sampled`` where no proof was found and
      the outputs agree on drawn data; ``none`` for an ``approximate``
      pass, which promises nothing of that kind.

    Raises:
      AssertionError: the outputs differ on drawn data.
    """
    from moecc.testing.laws import applied, check_preserves

    after, result = applied(item, graph)
    promise = result.preserves or item.preserves
    if promise.kind == "approximate":
        return "none"
    outputs = graph.outputs.keys()
    prover = Prover(exact=promise.kind == "exact")
    if prover.prove(graph, after, outputs=outputs, refute=False):
        return "proved"
    check_preserves(item, graph, seeds)
    return "sampled"
