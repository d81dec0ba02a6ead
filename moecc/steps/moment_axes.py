"""The moments that optimisers keep of a parameter: their names, and which of its axes they have."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.steps.settings import ParamSettings
from moecc.types.tensor import TensorType

FIRST, SECOND, ROW, COLUMN = "m", "v", "v_row", "v_col"
"""Kinds of moments: means of gradients, of squares, and of the squares of rows and of columns."""

COUNT = "count"
"""The number of updates, beside the moments."""


def count_of(first_step: int) -> str:
    """Return what the updates are counted as of parameters that are trained after so many steps."""
    return f"{COUNT}.{first_step}" if first_step else COUNT


FACTORED_FROM = 128
"""Adafactor factors the second moment of matrices with both sides as large, as optax does."""


def moment_kinds(optimizer: str, type: TensorType, settings: ParamSettings) -> tuple[str, ...]:
    """Return the kinds of moments that `optimizer` keeps of a parameter; none if it is frozen."""
    if not settings.trained:
        return ()
    if optimizer == "adafactor":
        return (SECOND,) if factored_axes(type, settings) is None else (ROW, COLUMN)
    if optimizer == "muon" and uses_muon(settings):
        return (FIRST,)
    return {"adamw": (FIRST, SECOND), "muon": (FIRST, SECOND)}.get(optimizer, ())


def uses_muon(settings: ParamSettings) -> bool:
    """Return whether Muon orthogonalises a parameter: matrices, but for tables and the head."""
    return settings.is_matrix and not settings.is_table


def moment_axes(kind: str, type: TensorType, settings: ParamSettings) -> tuple[str, ...]:
    """Return the axes that a moment has of those of its parameter, in their order."""
    found = factored_axes(type, settings)
    if found is None or kind not in (ROW, COLUMN):
        return type.names
    gone = found[0] if kind == ROW else found[1]
    return tuple(n for n in type.names if n != gone)


def factored_axes(type: TensorType, settings: ParamSettings) -> tuple[str, str] | None:
    """Return the axes that Adafactor's row and column means are taken over, or None.

    The largest axis of each block, and the next (Shazeer and Stern 2018, §4, as optax has it).
    """
    left = [d for d in range(type.rank) if d not in settings.blocks]
    sides = sorted(left, key=lambda d: type.shape[d])
    if len(sides) < 2 or type.shape[sides[-2]] < FACTORED_FROM:
        return None
    return type.names[sides[-1]], type.names[sides[-2]]


def moment_types(
    optimizer: str, params: Mapping[str, TensorType], settings: Mapping[str, ParamSettings]
) -> dict[str, dict[str, TensorType]]:
    """Return the types of all moments, by kind and parameter."""
    made: dict[str, dict[str, TensorType]] = {}
    for name, type in params.items():
        for kind in moment_kinds(optimizer, type, settings[name]):
            axes = moment_axes(kind, type, settings[name])
            made.setdefault(kind, {})[name] = type.with_axes(type[n] for n in axes)
    return made
