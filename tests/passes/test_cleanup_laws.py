"""The laws of the clean-up passes on random graphs."""

import pytest
from hypothesis import given, settings
from moecc_passes.cleanup import CanonicalizePass, CsePass, DcePass
from tiers import examples

from moecc.testing import graphs, laws

PASSES = [
    CanonicalizePass(),
    CanonicalizePass(exact=True),
    CsePass(),
    DcePass(),
    DcePass(keep_params=True),
]


@pytest.mark.parametrize("item", PASSES, ids=str)
@settings(max_examples=examples(30, 100))
@given(graph=graphs(dead=True))
def test_laws(item, graph):
    laws.check_pass(item, graph)
