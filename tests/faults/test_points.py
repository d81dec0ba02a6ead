"""Every point that an attack found is held by tests that are there."""

from __future__ import annotations

import pytest

from .elsewhere import is_a_test
from .points import POINTS


def test_every_point_is_there() -> None:
    assert sorted(POINTS) == list(range(30))


@pytest.mark.parametrize("number", POINTS)
def test_its_tests_are_there(number: int) -> None:
    assert POINTS[number].tests
    assert [name for name in POINTS[number].tests if not is_a_test(f"tests/{name}")] == []
