"""Numbers that must come out: of the ST-MoE paper, and of the code bases that implement it.

Losses have theirs in `test_losses`, who gets a slot in `test_slots`, layouts in ``tests/passes``,
parameter counts with the presets.
Formulas of drop rates are those of a binomial load: tokens choose independently and evenly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import F64, Builder, Graph, tensor
from moecc.ir.ops.slots import capacity
from moecc.testing import run_reference

from .layers import best, slots

SEEDS = st.integers(0, 2**32 - 1)

PAPER: dict[str, Any] = {"convention": "tokens", "rounding": "floor", "multiple": 1, "minimum": 4,
                         "cap": True}  # fmt: skip
CODE_BASES: dict[str, dict[str, Any]] = {
    "mesh-tensorflow": PAPER,
    "flaxformer": {**PAPER, "rounding": "round", "cap": False},
    "vmoe": {"convention": "assignments", "rounding": "ceil", "multiple": 4, "minimum": 1,
             "cap": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "factor", "experts", "expected"),
    [
        (4096, 1.25, 64, (80, 80, 80)),
        (4096, 2.0, 64, (128, 128, 128)),
        (2048, 1.25, 32, (80, 80, 80)),
        (456, 1.25, 32, (17, 18, 20)),
        (456, 2.0, 32, (28, 28, 32)),
        (128, 1.25, 64, (4, 4, 4)),
        (64, 64.0, 8, (64, 512, 512)),
    ],
)
def test_capacities_of_three_conventions(tokens, factor, experts, expected):
    found = [
        capacity({**rule, "capacity_factor": factor, "experts": experts}, tokens, 1)
        for rule in CODE_BASES.values()
    ]
    assert tuple(found) == expected


# --- what is dropped


@given(SEEDS, st.sampled_from([0.5, 1.0, 1.25, 2.0]))
def test_how_many_are_kept(seed, factor):
    """Per expert min(C, n1 + n2), in all at most E · C; first choices min(C, n1)."""
    scores = np.random.default_rng(seed).normal(size=(48, 6))
    choices = best(scores, 2)
    limit = capacity({**PAPER, "capacity_factor": factor, "experts": 6}, 48, 2)
    found = slots(choices, 6, capacity_factor=factor)
    for expert in range(6):
        mine = choices == expert
        assert (found[mine] >= 0).sum() == min(limit, mine.sum())
        assert (found[:, 0][mine[:, 0]] >= 0).sum() == min(limit, mine[:, 0].sum())
    kept = (found >= 0).sum()
    assert kept <= 6 * limit
    if factor < 2:
        assert kept / 96 <= factor / 2


@given(SEEDS, st.sampled_from([0.5, 1.25]))
def test_combine_weights(seed, factor):
    """A slot holds one token at most, and the weights of a token add up to 1 at most."""
    graph = Graph()
    b = Builder(graph)
    logits = graph.input("l", tensor(F64, token="T", expert=6))
    experts, gates = b.route(logits, top_k=2)
    slots = b.assign_slots(
        experts, tokens="token", experts=6, slots="capacity", capacity_factor=factor, minimum=4
    )
    for name, value in {"e": experts, "g": gates, "p": slots}.items():
        graph.set_output(name, value)
    found = run_reference(graph, inputs={"l": np.random.default_rng(seed).normal(size=(48, 6))})
    kept = found["p"] >= 0
    taken = np.stack([found["e"][kept], found["p"][kept]], 1)
    assert len(np.unique(taken, axis=0)) == len(taken)
    weight = np.where(kept, found["g"], 0).sum(1)
    assert (weight <= 1 + 1e-12).all()
    np.testing.assert_allclose(weight[kept.all(1)], 1, rtol=1e-12)
    assert (found["g"][:, 0] >= 0.5 - 1e-12).all()


# --- a constant of another code base's own tests
