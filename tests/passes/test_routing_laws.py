"""Laws of every way of routing that ``upcycle``, ``st-moe`` and ``specialize`` make.

Experts differ, for among copies most laws are vacuous.  Tokens and weights are normal numbers, so
that nothing is a tie.
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.specialize import SpecializePass

from moecc.ir import I32, clone, tensor

from .dense_blocks import EXACT, Dense, Tensors, applied, relative, run, shown, upcycled

SEEDS = st.integers(0, 2**32 - 1)
EXPERTS = 6

TOKEN_CHOICE = {
    "renormalised": {},
    "softmax": {"gates": "softmax", "top_k": 3},
    "sigmoid": {"gates": "sigmoid", "top_k": 1},
    "switch": {"gates": "switch", "top_k": 1},
    "sparsemixer": {"gates": "sparsemixer"},
    "ones": {"gates": "ones"},
    "bias": {"gates": "sigmoid-renormalised", "gate_scale": 2.5, "balance_bias": True},
    "granular": {"granularity": 2},
    "shared": {"shared": 0.25},
    "st-moe": {"expert_bias": "multiplicative", "extra_ffn": "after"},
    "shifted": {"expert_bias": "additive", "extra_ffn": "before"},
}
PLACED = TOKEN_CHOICE | {
    "prototypes": {"routing": "prototypes"},
    "hash": {"routing": "hash"},
}
"""The ways in which a token has choices that may be dropped."""

ALL = PLACED | {
    "expert-choice": {"routing": "expert-choice", "capacity_factor": 0.75},
    "soft": {"routing": "soft", "soft_slots": 2, "shared": 0.25},
}
DENSE = Dense(bias_in=True, bias_out=True, residual=True)


FEW = settings(max_examples=max(20, settings.default.max_examples // 5))
"""A law is tried with each way of routing."""


@cache
def converted(kind):
    dense = DENSE.graph()
    dense.input("tokens", tensor(I32, batch="B", seq="S"))
    graph, _ = upcycled(dense, **{"experts": EXPERTS, "router_std": 0.5, **ALL[kind]})
    return graph, Tensors(dense).params(graph)


@cache
def sparse(kind, **options):
    """Return a graph, specialised if there are options, that tells where choices went, too."""
    graph, _ = converted(kind)
    if options:
        graph, _ = applied(SpecializePass(mode="eval", minimum=1, **options), graph)
    return shown(clone(graph), "route", "assign_slots")


def different(kind, seed):
    """Return parameters whose experts are all different."""
    rng = np.random.default_rng(seed)
    return {n: a + rng.normal(0, 0.3, a.shape) for n, a in converted(kind)[1].items()}


def inputs_of(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 40, (2, 8)).astype(np.int32)
    return {"x": rng.normal(size=(2, 8, DENSE.embed)), "tokens": ids}


def permuted(graph, params, order):
    """Return the parameters with everything that has an axis ``expert`` in another order."""
    made = dict(params)
    for name, param in graph.params.items():
        if "expert" in param.type:
            made[name] = np.take(params[name], order, axis=param.type.names.index("expert"))
    return made


def respecting_groups(kind, order):
    """Return an order of the experts that the way of routing cannot see.

    Prototypes are groups of three: they are exchanged whole, and permuted within.
    """
    if kind != "prototypes":
        return order
    groups = [[e for e in order if e // 3 == g] for g in (0, 1)]
    return groups[order[0] // 3] + groups[1 - order[0] // 3]


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "hash"])
@FEW
@given(SEEDS, st.permutations(range(EXPERTS)), st.booleans())
def test_the_order_of_experts_and_router_rows_does_not_matter(kind, seed, order, bounded):
    is_bounded = bounded and kind in PLACED
    graph = sparse(kind, capacity_factor=0.75) if is_bounded else sparse(kind)
    params, inputs = different(kind, seed), inputs_of(seed)
    order = respecting_groups(kind, order)
    before, after = (run(graph, p, inputs) for p in (params, permuted(graph, params, order)))
    assert relative(after["y"], before["y"]) <= EXACT
    if kind in TOKEN_CHOICE:
        np.testing.assert_array_equal(np.array(order)[after["route.0"]], before["route.0"])
        np.testing.assert_array_equal(after["assign_slots.0"], before["assign_slots.0"])


@pytest.mark.parametrize("kind", PLACED)
@FEW
@given(SEEDS, st.sampled_from(["choice", "token"]), st.booleans(), st.sampled_from([1, 2]))
def test_a_larger_capacity_drops_nothing_that_a_smaller_one_keeps(
    kind, seed, order, priority, groups
):
    params, inputs = different(kind, seed), inputs_of(seed)
    options = {"order": order, "groups": groups}
    if kind in TOKEN_CHOICE and kind != "ones":
        options["priority"] = priority
    found = [
        run(sparse(kind, capacity_factor=factor, **options), params, inputs)
        for factor in (0.25, 0.5, 1.0, 2.0, float(EXPERTS))
    ]
    dropped = [outputs["assign_slots.0"] < 0 for outputs in found]
    assert all(smaller[larger].all() for smaller, larger in pairwise(dropped))
    assert dropped[0].any()
    assert not dropped[-1].any()
    assert relative(found[-1]["y"], run(sparse(kind), params, inputs)["y"]) <= EXACT
