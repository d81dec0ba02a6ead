"""Arrays whose element type and rank are known when they are looked at, not to a type checker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # numpy takes longer to import than everything that `moecc --help` needs
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
"""An array of any element type; what it must be stands beside the parameter."""

Arrays: TypeAlias = Mapping[str, Array]
"""Arrays by name."""

Doubles: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
"""An array of float64, in which formulas are computed."""
