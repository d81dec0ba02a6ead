"""The tests are tested: every wrong pass is caught, and no right one is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from moecc.ir import Graph, equal
from moecc.testing import graphs, laws


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks the module up by name.
    sys.modules.setdefault("mutants", module)
    spec.loader.exec_module(module)
    return module


mutants = _load()

EXAMPLES = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


def test_there_are_enough_mutants() -> None:
    assert len(mutants.MUTANTS) >= 10


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_each_mutant_is_caught(name: str) -> None:
    item = mutants.MUTANTS[name]

    @EXAMPLES
    @given(graphs())
    def law(graph: Graph) -> None:
        laws.check_pass(item, graph, idempotent=name in mutants.CAUGHT_BY_IDEMPOTENCE)

    with pytest.raises(AssertionError):
        law()


@pytest.mark.parametrize("name", mutants.SOUND)
def test_no_sound_rewrite_is_caught(name: str) -> None:
    item = mutants.SOUND[name]
    changed = 0

    @settings(EXAMPLES, max_examples=100)
    @given(graphs())
    def law(graph: Graph) -> None:
        nonlocal changed
        after, _ = laws.applied(item, graph)
        changed += not equal(after, graph)
        laws.check_pass(item, graph, idempotent=False)

    law()
    assert changed > 0
