"""Names of a module of the core that the package of the backends has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from moecc.errors import MachineError
from moecc.support.extras import install_hint


def lazy_names(
    module: str, names: tuple[str, ...], package: str, needs: Mapping[str, str]
) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose names are loaded when they are first used.

    Args:
      module: the name of the module.
      names: its public names.
      package: what has them, within the package of the backends.
      needs: the libraries that it imports, and the extra that installs each.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        missing = [library for library in needs if find_spec(library) is None]
        if missing:
            hint = install_hint(*(needs[library] for library in missing))
            raise MachineError(f"{module} needs {' and '.join(missing)}", hint=hint)
        for point in entry_points(group="moecc.backends"):
            return getattr(import_module(f"{point.module}.{package}"), name)
        raise MachineError(f"no installed package has {module}", hint="install moecc again")

    return attribute
