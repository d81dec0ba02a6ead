"""The backends that moecc ships, behind the entry point ``moecc.backends``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moecc.errors import MachineError
from moecc.support.extras import install_hint

if TYPE_CHECKING:
    from moecc.backend import Backend


def _reference() -> Backend:
    from moecc_backends.reference import ReferenceBackend

    return ReferenceBackend()


def _xla() -> Backend:
    if find_spec("jax") is None:
        raise MachineError("the xla backend needs jax", hint=install_hint("xla"))
    from moecc_backends.xla.import_jax import import_jax

    import_jax()
    from moecc_backends.xla.backend import XlaBackend

    return XlaBackend()


def _torch_source() -> Backend:
    from moecc_backends.torch_source import TorchSourceBackend

    return TorchSourceBackend()


def _jax_source() -> Backend:
    from moecc_backends.jax_source import JaxSourceBackend

    return JaxSourceBackend()


REGISTRY: dict[str, Callable[[], Backend]] = {
    "reference": _reference,
    "xla": _xla,
    "torch_source": _torch_source,
    "jax_source": _jax_source,
}
