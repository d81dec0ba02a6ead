"""What whole graphs mean in index notation is what the reference computes: numbers for both.

The term of every value of a graph, as the prover's lemmas have rewritten it, is evaluated in NumPy
and compared with the array that the reference has for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend
from tiers import examples, some

from moecc.ir import Graph, clone
from moecc.ir.arrays import NOTHING
from moecc.ir.arrays import Array as NamedArray
from moecc.ir.graph import Node, Value
from moecc.ir.ops.attention import RelativeBucketsOp, RopeOp, SignedBucketsOp
from moecc.ir.ops.elementwise import FORMULAS, rounded
from moecc.ir.ops.routing import HashExpertsOp
from moecc.ir.text import parse
from moecc.prove.evaluation import Evaluation, Terms
from moecc.prove.rules import Lemmas
from moecc.prove.stopped import STOPPED
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.terms import tensor as tensors
from moecc.terms.term import (
    INDICATORS,
    Abstraction,
    Algebra,
    Application,
    Monomial,
    Polynomial,
    Size,
    Var,
)
from moecc.testing.data import inputs_for, params_for, sizes_for
from moecc.testing.generate import random_graph
from moecc.types import DTYPES

from ..oracle import matrix  # noqa: TID252
from .reflection import MEANINGS
from .test_meanings import Arrays

Table = tuple[tuple[Var, ...], np.ndarray]
"""Variables, and the number that a term is for each of their values, an axis for a variable."""


class UnknownFunction(Exception):
    """A term applies a function of which nothing is known."""


class Tables(Arrays):
    """The terms of a graph as arrays over their free variables, each computed once.

    Args:
      graph: the graph.
      terms: its terms.
      arrays: what the reference computed of it.
    """

    def __init__(self, graph: Graph, terms: Terms, arrays: dict[Value, NamedArray]) -> None:
        super().__init__(None, arrays, {})
        self.nodes = [*graph.every_node()]
        self.extents: dict[Size, int] = {}
        self.leaves: dict[str, np.ndarray] = {}
        self._tables: dict[object, Table] = {}
        self._assigned: dict[Hashable, tuple[np.ndarray, np.ndarray, int]] = {}
        for value, tensor in terms.items():
            if value in arrays:
                array = arrays[value]
                for name, extent in zip(array.axes, array.data.shape, strict=True):
                    self.extents[tensor.axis(name).size] = extent
                if value.node is None:
                    kind = "parameter" if value.is_param else "input"
                    self.leaves[f"{kind} {value.name}"] = array.to(v.name for v in tensor.axes)
        for value, tensor in terms.items():
            if tensor.slots is not None and value in arrays:
                slots = tensor.slots
                axes = (*slots.tokens, slots.choice)
                count = self.extents[slots.choice.size]
                try:
                    experts = self.over(axes, slots.experts).reshape(-1, count)
                except UnknownFunction:
                    continue
                array = arrays[value]
                assert array.assignment is not None
                numbers = array.to(v.name for v in axes).reshape(-1, count)
                groups = len(array.assignment.extents)
                self._assigned[slots.head, slots.operands] = experts, numbers, groups

    def extent(self, v: Var) -> int:
        """Return the size of the axis of a variable in the arrays."""
        return v.size if isinstance(v.size, int) else self.extents[v.size]

    def over(self, variables: Sequence[Var], term: Polynomial) -> np.ndarray:
        """Return a term at all values of variables, among which its free ones are."""
        shape = [self.extent(v) for v in variables]
        return np.broadcast_to(_aligned(self.numbers(term), variables), shape)

    def numbers(self, term: Any) -> Table:
        """Return a variable, a factor, a monomial or a polynomial as a table."""
        if term not in self._tables:
            self._tables[term] = self._computed(term)
        return self._tables[term]

    def _computed(self, term: Any) -> Table:
        match term:
            case Var():
                return (term,), np.arange(self.extent(term))
            case Polynomial():
                parts = ((*self.numbers(m), float(c)) for m, c in term.terms)
                total = (_aligned((vs, x), term.free) * c for vs, x, c in parts)
                return term.free, reduce(np.add, total, np.zeros([1] * len(term.free)))
            case Monomial():
                return term.free, self._sum(term)
            case Application():
                return term.free, self._apply(term)
        raise TypeError(f"{term!r} is no term")

    def _sum(self, term: Monomial) -> np.ndarray:
        """Return a product of factors, summed over the bound variables."""
        every = (*term.free, *term.bound)
        tables = [self.numbers(f) for f in term.factors]
        shape = [self.extent(v) for v in every]
        if all(np.isfinite(x).all() for _, x in tables):
            # A variable that no factor has is summed over, too.
            plain = [((v,), np.ones(self.extent(v))) for v in every]
            operands: list[Any] = [np.ones(()), []]
            for vs, x in [*tables, *plain]:
                broadcast = np.broadcast_to(x, [self.extent(v) for v in vs])
                operands += [broadcast, [every.index(v) for v in vs]]
            return np.einsum(*operands, [*range(len(term.free))], optimize="greedy")
        # Where an indicator is 0, other factors may have no value.
        holds, value = np.ones(shape), np.ones(shape)
        for factor, table in zip(term.factors, tables, strict=True):
            is_indicator = isinstance(factor, Application) and factor.head.name in INDICATORS
            if is_indicator:
                holds = holds * _aligned(table, every)
            else:
                value = value * _aligned(table, every)
        value = np.where(holds != 0, value, 0.0)
        return value.sum(axis=tuple(range(len(term.free), len(every))))

    def _apply(self, term: Application) -> np.ndarray:
        """Return a head applied, over the free variables."""
        name, attrs = term.head
        attrs = attrs[:-1] if attrs[-1:] == (STOPPED,) else attrs
        shape = [self.extent(v) for v in term.free]
        arguments = [self.over(term.free, p) for p in term.arguments]
        if attrs and str(attrs[0]) in self.leaves and attrs[-1] == "value":
            return _at(self.leaves[str(attrs[0])], arguments)
        if name == "let":
            (function,) = term.abstractions
            return _at(self.over(function.variables, function.body), arguments)
        if name == "stack":
            return np.choose(np.rint(arguments[0]).astype(int), arguments[1:], mode="clip")
        tables = [self._function(a, term.free) for a in term.abstractions]
        known = self._known(term, name.removesuffix(" of infinite"), attrs)
        if not tables and name in FORMULAS and name not in MEANINGS:
            return np.asarray(FORMULAS[name](*arguments), float)
        values = np.full(shape, np.nan)
        for at in np.ndindex(*shape):
            with suppress(IndexError):  # beyond an end, where an indicator has to be 0
                values[at] = known(attrs, [t[at] for t in tables], [x[at] for x in arguments])
        return values

    def _function(self, function: Abstraction, free: Sequence[Var]) -> np.ndarray:
        """Return a function of indices, which come last, over free variables.

        Of a closed function the indices may be named as what is free around it.
        """
        values = self.over((*function.free, *function.variables), function.body)
        order = [function.free.index(v) for v in free if v in function.free]
        values = values.transpose([*order, *range(len(order), values.ndim)])
        shape = [self.extent(v) if v in function.free else 1 for v in free]
        values = values.reshape([*shape, *values.shape[len(order) :]])
        every = [self.extent(v) for v in free]
        return np.broadcast_to(values, [*every, *values.shape[len(free) :]])

    def _known(self, term: Application, name: str, attrs: Sequence[Any]) -> Callable[..., object]:
        """Return what a head means, of its attributes, functions and arguments."""
        key = attrs[1:] if name == "token_of" else attrs
        if (assigned := self._assigned.get((key, term.abstractions))) is not None:
            return lambda attrs, tables, at: _place(name, attrs, *assigned, tables, at)
        self.node = self._node(name, attrs)
        if name in FORMULAS and name not in MEANINGS:
            return lambda attrs, tables, at: FORMULAS[name](*at)
        known = getattr(self, f"_{name}", None) or MEANINGS.get(name)
        if known is None or name in ("slot", "slot_of", "own_slot", "placed", "token_of"):
            raise UnknownFunction(name)
        return known

    def _node(self, name: str, attrs: Sequence[Any]) -> Node | None:
        """Return a node of the operation, with the attributes, that a head names, if there is."""
        for node in self.nodes:
            op = node.op.name
            if name.startswith("rope_") and op == "rope":
                own = RopeOp.of_node(node).written("axis")
            elif name == "pointwise" == op:
                own = (Evaluation._text(node, node.attrs),)
            elif name == "hashed_expert" and op == "hash_experts":
                hashed = HashExpertsOp.of_node(node)
                own = (hashed.experts, hashed.seed, hashed.hash)
            elif name == "integer" and op == "relative_buckets":
                buckets = RelativeBucketsOp.of_node(node)
                own = ("bucket", buckets.bidirectional, buckets.buckets, buckets.max_distance)
            elif name == "integer" and op == "signed_buckets":
                signed = SignedBucketsOp.of_node(node)
                own = ("signed", signed.buckets, signed.max_distance)
            else:
                continue
            if tuple(own) == tuple(attrs):
                return node
        return None

    def _cast(self, attrs: Sequence[Any], tables: object, at: Sequence[float]) -> float:
        old, new = (DTYPES[str(a)] for a in attrs)
        return float(rounded(np.asarray(at[0]), old, new))

    def _constant(self, attrs: Sequence[Any], tables: object, at: object) -> float:
        return float(attrs[0])

    def _holds(self, attrs: Sequence[Any], tables: object, at: Sequence[float]) -> bool:
        if attrs[0] == "threshold":
            return at[0] > attrs[1]
        if attrs[0] == "equal":
            return at[0] == at[1]
        return super()._holds(attrs, tables, at)

    def _masked_share(self, attrs: Sequence[Any], tables: Sequence[np.ndarray], at: Any) -> float:
        return self._share(("softmax",), tables, at)

    def _share(self, attrs: Sequence[Any], tables: Sequence[np.ndarray], at: Any) -> float:
        shift = tables[0].max() if attrs[0] == "softmax" else 0.0  # so that nothing overflows
        return MEANINGS["share"](attrs, [tables[0] - shift], at)

    def _experts(self, attrs: Sequence[Any], tables: Sequence[np.ndarray], at: Any) -> float:
        shift = tables[0].max() if len(tables) > 1 and attrs[2] == "softmax" else 0.0
        return MEANINGS["experts"](attrs, [tables[0] - shift, *tables[1:]], at)

    def _group_sum(self, attrs: Sequence[Any], tables: Sequence[np.ndarray], at: Any) -> float:
        written = {k: int(n) for k, n in (str(a).split("=") for a in attrs)}
        size = written.get("group_size", 0)
        groups = tables[0].size // size if size else written.get("groups", 1)
        return float(tables[0].reshape(groups, -1).sum(1)[round(float(at[0]))])

    def _gate(self, attrs: Sequence[Any], tables: Sequence[np.ndarray], at: Sequence[float]) -> Any:
        return MEANINGS["gate"]([str(attrs[0]).removesuffix(" of infinite")], tables, at)

    def _size(self, attrs: Sequence[Any], tables: object, at: object) -> float:
        return float(self.extents[attrs[0]])

    def _inverse_size(self, attrs: Sequence[Any], tables: object, at: object) -> float:
        return 1 / self.extents[attrs[0]]


def _aligned(table: Table, variables: Sequence[Var]) -> np.ndarray:
    """Return a table with an axis for each of some variables, of size 1 where it has none."""
    own, x = table
    x = x.transpose([own.index(v) for v in variables if v in own])
    shape = iter(x.shape)
    return x.reshape([next(shape) if v in own else 1 for v in variables])


def _at(x: np.ndarray, places: Iterable[np.ndarray]) -> np.ndarray:
    """Return elements at places, and no number beyond an end, where an indicator has to be 0."""
    numbers = [np.rint(p).astype(int) for p in places]
    pairs = [*zip(numbers, x.shape, strict=True)]
    inside = reduce(np.logical_and, [(p >= 0) & (p < n) for p, n in pairs], np.True_)
    return np.where(inside, x[tuple(np.clip(p, 0, n - 1) for p, n in pairs)], np.nan)


def _place(
    name: str,
    attrs: Sequence[Any],
    experts: np.ndarray,
    slots: np.ndarray,
    groups: int,
    tables: Sequence[np.ndarray],
    at: Sequence[float],
) -> float:
    """Return what an assignment says: of a token and a choice, or of a group, expert and slot."""
    tokens, size = tables[0].shape[:-1], len(slots) // groups
    numbers = [round(float(x)) for x in at]
    if name in ("slot_of", "own_slot", "placed"):
        slot = slots[np.ravel_multi_index(numbers[:-1], tokens, mode="clip"), numbers[-1]]
        return float(slot >= 0 if name == "placed" else slot)
    if name == "group_of":
        return float(np.ravel_multi_index(numbers, tokens, mode="clip") // size)
    group, expert, slot = numbers
    part = slice(group * size, (group + 1) * size)
    found = np.argwhere((experts[part] == expert) & (slots[part] == slot))
    if name == "occupied":
        return float(len(found) > 0)
    token, choice = found[0] if len(found) else (0, 0)
    place = (*np.unravel_index(group * size + token, tokens), choice)
    return float(place[attrs[0]])


@np.errstate(all="ignore")  # a term is infinite where the reference is
def compared(graph: Graph, seed: int) -> Counter[str]:
    """Compare every value of a graph with its term; return the number of numbers, and of others."""
    graph = clone(graph)
    for value in graph.params.values():
        value.weight = None
    sizes = sizes_for(graph, seed)
    data = params_for(graph, seed, sizes), inputs_for(graph, seed, sizes)
    arrays = dict(ReferenceBackend().compile(graph).trace(*data))
    terms = Evaluation(Algebra(Lemmas())).evaluate(graph)
    tables, counts = Tables(graph, terms, arrays), Counter[str]()
    for value, array in arrays.items():
        term, expected = terms[value], array.to(terms[value].names)
        try:
            found = tables.over(term.axes, term.body)
        except UnknownFunction as error:
            counts[str(error)] += 1
            continue
        counted = ~np.isnan(expected) if expected.dtype.kind == "f" else expected != NOTHING
        right = np.asarray(expected, float)[counted]
        assert np.allclose(found[counted], right, rtol=1e-9, atol=1e-11), (value, term.body)
        counts["numbers"] += right.size
    return counts


def test_terms_of_random_graphs_are_what_the_reference_computes() -> None:
    graphs = examples(50, 1000)
    counts = sum((compared(random_graph(seed), seed) for seed in range(graphs)), Counter[str]())
    assert counts.pop("numbers") > 500 * graphs
    # Nothing is claimed of what is drawn, and of operations on what may be infinite.
    assert all(name.startswith("operation ") for name in counts), counts


MIXTURES = [n for n in matrix.golden_names() if matrix.has_experts(n)]


@pytest.mark.parametrize("name", some(MIXTURES, "mixtral_gqa", "switch_half", "gpt_oss_square_v4"))
def test_terms_of_a_mixture_are_what_the_reference_computes(name: str) -> None:
    counts = compared(matrix.source_graph(name), 1)
    assert counts.pop("numbers") > 8000
    assert set(counts) <= {"operation convolve"}


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("llama_gqa", "upcycle{experts=4 granularity=2 top-k=4 router-std=1}"),
        (
            "llama_gqa",
            "upcycle{experts=4 slots=capacity capacity-factor=1 groups=2 router-std=1},add-losses",
        ),
        ("bert_square", "upcycle{experts=4 routing=expert-choice capacity-factor=2},add-losses"),
        ("bert_gelu", "upcycle{experts=4 routing=hash}"),
        ("mixtral_gqa", "roll-layers"),
    ],
)
def test_terms_of_what_passes_make_are_what_the_reference_computes(
    name: str, pipeline: str
) -> None:
    graph = clone(matrix.source_graph(name))
    run_pipeline(graph, Pipeline.parse(pipeline))
    assert compared(graph, 1)["numbers"] > 10_000


def test_a_wrong_lemma_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate mean as the sum, as a wrong lemma would have it."""
    monkeypatch.setattr(tensors, "inverse_size", lambda algebra, axis: algebra.one)
    graph = parse("""moecc 1
graph g {
  input %x : f32[batch=B, embed=3]
  %y = mean %x {axes=embed} : f32[batch=B]
  output y = %y
}
""")
    with pytest.raises(AssertionError, match="%y"):
        compared(graph, 1)
