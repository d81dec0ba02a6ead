"""What operations mean in index notation is what they mean in NumPy: numbers for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend

from moecc.ir.arrays import Array
from moecc.ir.graph import Node, Value
from moecc.ir.operation import OPS
from moecc.ir.ops.attention import (
    RelativeBucketsOp,
    RopeOp,
    SignedBucketsOp,
    alibi_slopes,
)
from moecc.ir.ops.elementwise import FORMULAS, PointwiseOp
from moecc.ir.ops.recurrence import DeltaRuleOp
from moecc.ir.ops.routing import HashExpertsOp
from moecc.prove.evaluation import Evaluation
from moecc.prove.rules import Lemmas
from moecc.terms.term import Algebra, Application

from ..ir.operations import Function, sample  # noqa: TID252
from .reflection import MEANINGS, Env, Model

UNINTERPRETED = {
    "convolve", "fold_key", "jax", "random_normal", "random_uniform", "update_slice",
    "within_buffer",
}  # fmt: skip
"""Operations that are functions of all of their operands, of which nothing is known."""


class Arrays(Model):
    """The interpretation of heads by the reference: sources are arrays, functions are NumPy's."""

    def __init__(self, node: Node, arrays: dict[Value, Array], data: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.node, self.data = node, data
        self.arrays = {v.name: a for v, a in arrays.items()}

    def _applied(self, term: Application, env: Env) -> float:
        name, attrs = term.head
        if attrs and str(attrs[0]).startswith("input "):
            at = tuple(round(self.value(p, env)) for p in term.arguments)
            return float(self.data[str(attrs[0])[6:]][at])
        if name == "family":
            leaf, *at = (round(self.value(p, env)) for p in term.arguments)
            return float(self.data[str(attrs[0][leaf])[6:]][tuple(at)])  # type: ignore[index]
        if name in FORMULAS and name not in MEANINGS:
            return float(FORMULAS[name](*(self.value(p, env) for p in term.arguments)))
        known = getattr(self, f"_{name}", None)
        if known is None or name == "slot":
            return super()._applied(term, env)
        arguments = [self.value(p, env) for p in term.arguments]
        if name in ("slot_of", "token_of", "occupied", "placed", "own_slot", "group_of"):
            return float(known(attrs, (), [round(x) for x in arguments]))
        return float(known(attrs, [self.table(a, env) for a in term.abstractions], arguments))

    def _unknown(self, head: Sequence[object], *_: object) -> float:
        raise NotImplementedError(head[0])

    def _normal_cdf(self, attrs, tables, at):
        return math.erfc(-at[0] / math.sqrt(2)) / 2

    def _pointwise(self, attrs, tables, at):
        return PointwiseOp.of_node(self.node).meaning(Array(np.array(at[0]), ())).data

    def _rms(self, attrs, tables, at):
        (x,) = tables
        return x[round(at[0])] / math.sqrt(np.square(x).mean() + attrs[0])

    def _layer_norm(self, attrs, tables, at):
        (x,) = tables
        return (x - x.mean())[round(at[0])] / math.sqrt(x.var() + attrs[0])

    def _max(self, attrs, tables, at):
        return tables[0].max()

    def _logsumexp(self, attrs, tables, at):
        return math.log(np.exp(tables[0]).sum())

    def _masked_share(self, attrs, tables, at):
        return (np.exp(tables[0]) / np.exp(tables[0]).sum())[round(at[0])]

    def _mask(self, attrs, tables, at):
        return at[0] if at[1] else attrs[0]

    def _rotate(self, attrs, tables, at):
        x, cos, sin = tables
        turned = np.concatenate([-x[len(x) // 2 :], x[: len(x) // 2]])
        return (x * cos + turned * sin)[round(at[0])]

    def _rope(self, function, tables, at):
        op = RopeOp.of_node(self.node)
        length = round(tables[0].max()) + 1 if tables else 1
        entry = round(at[1]) % (op.size // 2)
        return function(at[0] * op.frequencies(length)[entry]) * op.attention_factor

    def _rope_cos(self, attrs, tables, at):
        return self._rope(math.cos, tables, at)

    def _rope_sin(self, attrs, tables, at):
        return self._rope(math.sin, tables, at)

    def _integer(self, attrs, tables, at):
        kinds = {"bucket": RelativeBucketsOp, "signed": SignedBucketsOp}
        op = kinds[attrs[0]].of_node(self.node)
        return op.meaning(Array(np.zeros((), int), ()), Array(np.array(round(at[0])), ())).data

    def _alibi(self, attrs, tables, at):
        return at[0] * alibi_slopes(*attrs)[round(at[1])]

    def _delta_rule(self, attrs, tables, at):
        op = DeltaRuleOp({"over": "k", "along": "t"})
        axes = (("k",), ("t", "k"), *[("t",)] * 4)
        return op.meaning(*(Array(x, names) for x, names in zip(tables, axes, strict=True))).data

    def _hashed_expert(self, attrs, tables, at):
        chosen = HashExpertsOp.of_node(self.node).meaning(Array(np.array([round(at[0])]), ("i",)))
        return chosen.data[0, round(at[1])]

    def _holds(self, attrs, tables, at):
        if attrs[0] == "less":
            return at[0] < at[1]
        if attrs[0] == "same_segment":
            return at[0] == at[1] or at[0] == 0
        assert attrs[0] == "random"
        return at[1] < at[0] / attrs[1]

    def _group_sum(self, attrs, tables, at):
        return np.split(tables[0], 2)[round(at[0])].sum()

    # Slots, as the reference assigned them: four tokens in two groups.

    def _slot_of(self, attrs, tables, at):
        return self.arrays[self._slots].data[tuple(at)]

    @property
    def _slots(self) -> str:
        return next(n for n in ("slots", self.node.results[-1].name) if n in self.arrays)

    def _own_slot(self, attrs, tables, at):
        return self._slot_of(attrs, tables, at)

    def _placed(self, attrs, tables, at):
        return self._slot_of(attrs, tables, at) >= 0

    def _group_of(self, attrs, tables, at):
        return at[0] // 2

    def _row(self, at):
        slots, chosen = self.arrays[self._slots].data, self.data["chosen"]
        for token, choice in np.ndindex(*slots.shape):
            if (token // 2, chosen[token, choice], slots[token, choice]) == tuple(at):
                return token, choice
        return None

    def _occupied(self, attrs, tables, at):
        return self._row(at) is not None

    def _token_of(self, attrs, tables, at):
        row = self._row(at)
        return 0 if row is None else row[attrs[0]]


DEFINED = sorted(n for n, entry in OPS.items() if entry.meaning is not None)


@pytest.mark.parametrize("name", [n for n in DEFINED if n not in UNINTERPRETED])
def test_a_term_is_the_reference(name: str) -> None:
    node = sample(name)
    evaluation = Evaluation(Algebra(Lemmas()))
    terms = evaluation.evaluate(node.graph)
    data = Function(node).inputs(3)
    arrays = dict(ReferenceBackend().compile(node.graph).trace({}, data))
    model = Arrays(node, arrays, data)
    for value in node.results:
        tensor, expected = terms[value], arrays[value]
        for at in product(*map(range, expected.data.shape)):
            places = dict(zip(expected.axes, at, strict=True))
            env = {v: places[v.name] for v in tensor.axes}
            right = float(expected.data[at])
            if math.isnan(right):  # beyond a ragged extent
                continue
            got = model.value(tensor.body, env)
            assert math.isclose(got, right, rel_tol=1e-9, abs_tol=1e-12), (value, at, tensor.body)


@pytest.mark.parametrize("name", sorted(UNINTERPRETED - {"jax"}))
def test_no_term_means_no_claim(name: str) -> None:
    terms = Evaluation(Algebra(Lemmas())).evaluate(sample(name).graph)
    factor = terms[sample(name).results[0]].body.factor
    assert isinstance(factor, Application)
    assert factor.head.name == f"operation {name}"
