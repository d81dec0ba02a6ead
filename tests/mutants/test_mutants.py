"""The tests are tested: every wrong pass is caught, and no right one is.

The modules beside this one have deliberately wrong passes by subject, each a mistake that somebody
has made or could make.  Those that values do not show are caught in ``test_kinds.py``.  The public
strategies and laws catch each of the others within 1,000 examples, most within a few.  Which
examples those are hangs on the modules that are loaded, too, since Hypothesis draws constants from
them.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from tiers import examples, some

from moecc.ir import equal
from moecc.testing import graphs, laws

from . import axes, experts, feed_forward, promises, routing, upcycling
from .sound import LIKE, SOUND

MUTANTS = {
    name: item
    for module in (feed_forward, axes, experts, routing, promises, upcycling)
    for name, item in module.MUTANTS.items()
}
"""Wrong passes by name; each promises `reassociation` unless its name says otherwise."""


EXAMPLES = settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


QUICK = (
    "swap_gate_and_up", "merge_nodes_with_other_attributes", "remove_an_output",
    "rename_the_wrong_axis", "gate_off_by_a_percent", "place_without_mask",
    "choose_without_the_bias", *promises.MUTANTS,
)  # fmt: skip
"""A mutant of each kind; the others show no more of the laws, and take longer to be found."""


@pytest.mark.parametrize("name", some(MUTANTS, *QUICK))
def test_each_mutant_is_caught(name):
    item = MUTANTS[name]

    @EXAMPLES
    @given(graphs())
    def law(graph):
        is_idempotent = name in promises.CAUGHT_BY_IDEMPOTENCE
        laws.check_pass(item, graph, idempotent=is_idempotent, least=0)

    # Not by the verifier, which would see to it without any law.
    reason = None if name in promises.MUTANTS else "the pass promises"
    with pytest.raises(AssertionError, match=reason):
        law()


@pytest.mark.parametrize(
    "name", some(SOUND, "commute", "reassociate", "store_in_a_wider_type", "upcycle")
)
def test_no_sound_rewrite_is_caught(name):
    item = SOUND[name]
    changed = 0

    @settings(EXAMPLES, max_examples=examples(30, 100))
    @given(graphs(like=LIKE.get(name, ())))
    def law(graph):
        nonlocal changed
        after, _ = laws.applied(item, graph)
        changed += not equal(after, graph)
        laws.check_pass(item, graph, idempotent=False, least=0)

    law()
    assert changed > 0
