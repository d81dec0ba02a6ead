"""The passes that moecc ships, behind the entry point ``moecc.passes``.

Each entry imports its pass only when it is asked for, so that listing passes costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.pipeline.passes import Pass


def _canonicalize() -> type[Pass]:
    from moecc_passes.canonicalize import CanonicalizePass

    return CanonicalizePass


def _cse() -> type[Pass]:
    from moecc_passes.cse import CsePass

    return CsePass


def _dce() -> type[Pass]:
    from moecc_passes.dce import DcePass

    return DcePass


def _upcycle() -> type[Pass]:
    from moecc_passes.upcycle.upcycle import UpcyclePass

    return UpcyclePass


REGISTRY: dict[str, Callable[[], type[Pass]]] = {
    "canonicalize": _canonicalize,
    "cse": _cse,
    "dce": _dce,
    "upcycle": _upcycle,
}
