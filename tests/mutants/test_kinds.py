"""Mutants that values do not show are caught: gradients, stored weights, outputs inside, meshes.

Each is found within 200 examples, from any of five seeds.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from tiers import examples, few

from moecc.ir import OPS, Graph, equal
from moecc.rewrite import P
from moecc.rewrite.passes import Pass
from moecc.testing import graphs, laws

from . import gradients, inner, meshes, stored
from .sound import LIKE, SOUND

SEEDS = range(5)

EXAMPLES = settings(
    max_examples=200,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)

MESH = "a:2,b:2"

KINDS = [
    *((item, name, graphs(like=gradients.LIKE)) for name, item in gradients.MUTANTS.items()),
    *((item, name, graphs()) for name, item in stored.MUTANTS.items()),
    *((item, name, graphs(like=inner.LIKE[name])) for name, item in inner.MUTANTS.items()),
    *((item, name, graphs(mesh=MESH)) for name, item in meshes.MUTANTS.items()),
]


@pytest.mark.parametrize("start", few(SEEDS))
@pytest.mark.parametrize(
    ("item", "strategy"), [(i, s) for i, _, s in KINDS], ids=[n for _, n, _ in KINDS]
)
def test_each_mutant_is_caught(item: Pass, strategy: Any, start: int) -> None:
    @seed(start)
    @EXAMPLES
    @given(strategy)
    def law(graph: Graph) -> None:
        laws.check_pass(item, graph, idempotent=False, least=0)

    with pytest.raises(AssertionError, match="the pass promises"):
        law()


@pytest.mark.parametrize("start", few(SEEDS))
@pytest.mark.parametrize("name", ["softmax", "rms_norm", "max", "logsumexp", "contract", "sum"])
def test_a_row_that_splits_what_must_be_whole_is_caught(name: str, start: int) -> None:
    operation = P.op(name, *(P.any() for _ in OPS[name].operands))

    @seed(start)
    @EXAMPLES
    @given(graphs(mesh=MESH, like=operation))
    def law(graph: Graph) -> None:
        laws.check_sharded(graph)

    wrong = pytest.raises(AssertionError, match="devices compute something else")
    with meshes.wrong_row(name), wrong:
        law()


@settings(EXAMPLES, max_examples=examples(25, 100))
@given(graphs(mesh=MESH))
def test_a_random_sharding_is_right(graph: Graph) -> None:
    laws.check_sharded(graph)


@pytest.mark.parametrize("name", [n for n in SOUND if "upcycle" not in n])
def test_no_sound_rewrite_is_caught_on_a_mesh(name: str) -> None:
    changed = 0

    @settings(EXAMPLES, max_examples=examples(25, 60))
    @given(graphs(mesh=MESH, like=LIKE.get(name, ())))
    def law(graph: Graph) -> None:
        nonlocal changed
        after, _ = laws.applied(SOUND[name], graph)
        changed += not equal(after, graph)
        laws.check_pass(SOUND[name], graph, idempotent=False, least=0)

    law()
    assert changed > 0
