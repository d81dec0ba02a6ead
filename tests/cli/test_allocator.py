"""Compilers allocate with jemalloc where there is one, and with what was asked for."""

import pytest

from moecc.jobs import compile as allocator
from moecc.jobs.compile import environment
from moecc.plan.machines import parse_machine

TPU = "tpu:v5p:2x2x1"


@pytest.fixture
def found(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("MALLOC_CONF", raising=False)
    monkeypatch.setattr(allocator, "_jemalloc", lambda: "libjemalloc.so.9")


@pytest.mark.usefixtures("found")
def test_a_compiler_gets_the_library_that_the_linker_knows():
    made = environment(parse_machine(TPU))
    assert made["LD_PRELOAD"] == "libjemalloc.so.9"
    assert made["MALLOC_CONF"] == "dirty_decay_ms:1000,muzzy_decay_ms:0"


def test_without_the_library_nothing_is_preloaded(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(allocator, "_jemalloc", lambda: None)
    assert "LD_PRELOAD" not in environment(parse_machine(TPU))
