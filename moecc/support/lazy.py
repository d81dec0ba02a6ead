"""NumPy and plotly, imported where they are first used.

Reading and printing a graph needs no array, and importing NumPy takes longer than everything else
that ``moecc opt`` does on a small graph.  The modules that state what operations and weight
expressions mean take ``np`` from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from plotly import graph_objects
else:

    class _Module:
        """Stands for a module, which is imported when an attribute is read for the first time."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    np = _Module("numpy")
    graph_objects = _Module("plotly.graph_objects")

__all__ = ["graph_objects", "np"]
