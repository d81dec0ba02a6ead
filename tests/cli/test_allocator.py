"""Compilers allocate with jemalloc where there is one, and with what was asked for."""

import pytest

from moecc.jobs.compile import environment
from moecc.plan.machines import parse_machine


@pytest.fixture
def variables_with(monkeypatch):
    """Return the environment of a compiler on a machine with an allocator, or without."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("MALLOC_CONF", raising=False)

    def variables(library):
        monkeypatch.setattr("moecc.jobs.compile._jemalloc", lambda: library)
        return environment(parse_machine("tpu:v5p:2x2x1"))

    return variables


def test_a_compiler_gets_the_library_that_the_linker_knows(variables_with):
    variables = variables_with("libjemalloc.so.9")
    assert variables["LD_PRELOAD"] == "libjemalloc.so.9"
    assert variables["MALLOC_CONF"] == "dirty_decay_ms:1000,muzzy_decay_ms:0"


def test_without_the_library_nothing_is_preloaded(variables_with):
    assert "LD_PRELOAD" not in variables_with(None)
