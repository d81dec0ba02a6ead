"""What of a wide test runs in `make test`, and what in `make test-all` alone.

A test that is parametrised over much keeps a few of its cases quick; the rest are marked ``slow``.
A property test that costs much draws fewer examples unless MOECC_TIER is ``all``, which
`make test-all` sets.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest


def few(items: Iterable[Any], quick: int = 1) -> list[Any]:
    """Return all items as parameters, those after the first ``quick`` marked slow."""
    return [item if n < quick else _slow(item) for n, item in enumerate(items)]


def some(items: Iterable[Any], *quick: str) -> list[Any]:
    """Return all names as parameters, those that are not among ``quick`` marked slow."""
    names = list(items)
    if unknown := set(quick) - set(names):
        raise ValueError(f"no such cases: {sorted(unknown)}")
    return [item if item in quick else _slow(item) for item in names]


def examples(quick: int, full: int) -> int:
    """Return how many examples a property test draws in this tier."""
    return full if os.environ.get("MOECC_TIER") == "all" else quick


def _slow(item: Any) -> Any:
    if hasattr(item, "marks"):
        return item._replace(marks=(*item.marks, pytest.mark.slow))
    values = item if isinstance(item, tuple) else (item,)
    return pytest.param(*values, marks=pytest.mark.slow)
