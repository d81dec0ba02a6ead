"""Strategies, oracles and laws for property tests of passes, moecc's own and a user's.

    from hypothesis import given
    from moecc.testing import graphs, laws

The strategies need Hypothesis (``pip install '.[testing]'``); the rest does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.testing import laws as laws
    from moecc.testing.data import inputs_for as inputs_for
    from moecc.testing.data import params_for as params_for
    from moecc.testing.data import sizes_for as sizes_for
    from moecc.testing.generate import random_graph as random_graph
    from moecc.testing.oracle import assert_same as assert_same
    from moecc.testing.oracle import differences as differences
    from moecc.testing.oracle import run_reference as run_reference
    from moecc.testing.strategies import graphs as graphs

_HOMES = {
    "inputs_for": "data",
    "params_for": "data",
    "sizes_for": "data",
    "random_graph": "generate",
    "assert_same": "oracle",
    "differences": "oracle",
    "run_reference": "oracle",
    "graphs": "strategies",
}
"""The module of each name: `convert` needs no random graphs, and Hypothesis is optional."""


def __getattr__(name: str) -> object:
    if name == "laws":
        return import_module("moecc.testing.laws")
    if name in _HOMES:
        return getattr(import_module(f"moecc.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
