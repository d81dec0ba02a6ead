"""Each method of conversion has a law that holds, and that a slip breaks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiers import examples

from .methods import METHODS, Mutant

CASES = [
    pytest.param(method, mutant, id=f"{method}-{mutant.name}-{number}")
    for method, (_, mutants) in METHODS.items()
    for number, mutant in enumerate(mutants)
]


@pytest.mark.parametrize("method", METHODS)
def test_the_law_of_a_method_holds(method: str) -> None:
    law, _ = METHODS[method]
    all_hold(law, examples(4, 50))


@pytest.mark.parametrize(("method", "mutant"), CASES)
def test_a_slip_is_caught(method: str, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    law, _ = METHODS[method]
    monkeypatch.setattr(mutant.module, mutant.name, mutant.wrong)
    with pytest.raises(AssertionError):
        all_hold(law, 20)


def all_hold(law: Callable[[int], None], count: int) -> None:
    for seed in range(count):
        law(seed)
