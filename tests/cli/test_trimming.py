"""Freed memory goes back while something runs, and nothing stays behind."""

from __future__ import annotations

import threading

import pytest

from moecc.ahead import worker as trimming
from moecc.ahead.worker import trimmed


def test_memory_is_given_back_while_something_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given, again = [], threading.Event()

    def trim(rest: int) -> None:
        given.append(rest)
        if len(given) > 1:
            again.set()

    monkeypatch.setattr(trimming, "_trim", lambda: trim)
    monkeypatch.setattr(trimming, "_SECONDS", 0.001)
    monkeypatch.setattr("sys.platform", "linux")
    with trimmed():
        assert again.wait(30)
    assert set(given) == {0}
    assert all(thread.name != "trim" for thread in threading.enumerate())


def test_another_library_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimming, "_trim", lambda: None)
    with trimmed():
        assert all(thread.name != "trim" for thread in threading.enumerate())
