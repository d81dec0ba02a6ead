"""Mutants that values do not show are caught: gradients, stored weights, outputs inside, meshes.

Each is found within 200 examples.
"""

from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from tiers import examples, few, some

from moecc.ir import OPS, equal
from moecc.rewrite import P
from moecc.testing import graphs, laws

from . import gradients, inner, meshes, stored
from .sound import LIKE, SOUND

EXAMPLES = settings(
    max_examples=200,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)

MESH = "a:2,b:2"

KINDS = {
    **{n: (item, partial(graphs, like=gradients.LIKE)) for n, item in gradients.MUTANTS.items()},
    **{n: (item, graphs) for n, item in stored.MUTANTS.items()},
    **{n: (item, partial(graphs, like=inner.LIKE[n])) for n, item in inner.MUTANTS.items()},
    **{n: (item, partial(graphs, mesh=MESH)) for n, item in meshes.MUTANTS.items()},
}
QUICK = (
    "let_the_gradient_through", "stop_the_other_factor", "round_to_bf16_and_promise_exact",
    "read_sources_as_bf16", "fold_a_factor_into_what_is_returned", "gather_an_output",
    "exchange_the_mesh_axes",
)  # fmt: skip


@pytest.mark.parametrize("name", some(KINDS, *QUICK))
def test_each_mutant_is_caught(name):
    item, strategy = KINDS[name]

    @seed(0)
    @EXAMPLES
    @given(strategy())
    def law(graph):
        laws.check_pass(item, graph, idempotent=False, least=0)

    with pytest.raises(AssertionError, match="the pass promises"):
        law()


@pytest.mark.parametrize("name", few(["softmax", "contract", "rms_norm", "max"], 2))
def test_a_row_that_splits_what_must_be_whole_is_caught(name):
    operation = P.op(name, *(P.any() for _ in OPS[name].operands))

    @seed(0)
    @EXAMPLES
    @given(graphs(mesh=MESH, like=operation))
    def law(graph):
        laws.check_sharded(graph)

    wrong = pytest.raises(AssertionError, match="devices compute something else")
    with meshes.wrong_row(name), wrong:
        law()


@settings(EXAMPLES, max_examples=examples(25, 100))
@given(graphs(mesh=MESH))
def test_a_random_sharding_is_right(graph):
    laws.check_sharded(graph)


@pytest.mark.parametrize(
    "name", some((n for n in SOUND if "upcycle" not in n), "commute", "reassociate")
)
def test_no_sound_rewrite_is_caught_on_a_mesh(name):
    changed = 0

    @settings(EXAMPLES, max_examples=examples(25, 60))
    @given(graphs(mesh=MESH, like=LIKE.get(name, ())))
    def law(graph):
        nonlocal changed
        after, _ = laws.applied(SOUND[name], graph)
        changed += not equal(after, graph)
        laws.check_pass(SOUND[name], graph, idempotent=False, least=0)

    law()
    assert changed > 0
