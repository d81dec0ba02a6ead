"""moecc: a compiler that turns dense Transformers into sparse mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecc.version import __version__ as __version__

if TYPE_CHECKING:
    from moecc.api.load_step import load_step as load_step
    from moecc.api.model import Model as Model
    from moecc.api.model import open as open
    from moecc.api.write_params import write_params as write_params

_LATE = {
    "Model": "moecc.api.model",
    "load_step": "moecc.api.load_step",
    "open": "moecc.api.model",
    "write_params": "moecc.api.write_params",
}
"""What is imported when it is first asked for, and from where: `moecc --help` needs none of it."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
