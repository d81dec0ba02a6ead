"""Families that nothing becomes: the message says why, and what to take instead."""

import re

import pytest

from moecc.errors import InputError
from moecc.families.registry import CONFIGS
from moecc.translate.propose import NOT_WRITTEN, check_target


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_why_and_what_instead(name):
    assert name not in CONFIGS
    with pytest.raises(InputError) as caught:
        check_target(name)
    (problem,) = caught.value.problems
    assert f"no model becomes a {name}: " in problem.message
    assert problem.hint
    assert set(re.findall(r"\w+", problem.hint)) & set(CONFIGS), "it names a family"
