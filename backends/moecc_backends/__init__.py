"""The backends that moecc ships, behind the entry point ``moecc.backends``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.backend import Backend


def _reference() -> Backend:
    from moecc_backends.reference.interpreter import ReferenceBackend

    return ReferenceBackend()


def _xla() -> Backend:
    from moecc_backends.xla.backend import XlaBackend

    return XlaBackend()


REGISTRY: dict[str, Callable[[], Backend]] = {"reference": _reference, "xla": _xla}
