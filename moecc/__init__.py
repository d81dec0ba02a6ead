"""moecc: a compiler that turns dense Transformers into sparse mixtures of experts.

Besides `open` and the names below, each command is a function: ``moecc.convert("a", "b")``.
Packages have the names of `plan`, `prove` and `train`: ``moecc.jobs.plan.plan`` is the function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecc.jobs import COMMANDS, python_name
from moecc.version import __version__ as __version__

if TYPE_CHECKING:
    from moecc.api.model import Model as Model
    from moecc.api.model import load_step as load_step
    from moecc.api.model import open as open
    from moecc.api.model import write_params as write_params

_API = ("Model", "load_step", "open", "write_params")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API, *map(python_name, COMMANDS)})


def __getattr__(name: str) -> Any:
    from importlib import import_module

    # Imported when it is first asked for: `moecc --help` needs none of it.
    if name not in (*_API, *map(python_name, COMMANDS)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("moecc.api.model" if name in _API else f"moecc.jobs.{name}")
    return getattr(module, name)
