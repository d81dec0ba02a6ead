"""Any JAX function: ``from moecc import jax as mx``, then ``mx.convert(loss, params, batch, …)``.

The functions need jax and are in the package of the backends, which is loaded when a name is first
used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from moecc.errors import MachineError
from moecc.support.extras import install_hint

NAMES = ("Conversion", "convert", "graph", "load")
"""The public names."""

__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_package(), name)


def _package() -> Any:
    """Return the package that has the names.

    Raises:
      MachineError: jax is not installed, or moecc was installed without its backends.
    """
    if find_spec("jax") is None:
        raise MachineError("moecc.jax needs jax", hint=install_hint("xla"))
    for point in entry_points(group="moecc.jax"):
        return import_module(point.value)
    raise MachineError("no installed package has moecc.jax", hint="install moecc again")
