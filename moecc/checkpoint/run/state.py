"""The arrays of a saved state: zarr in one database, as Orbax writes them."""

from __future__ import annotations

from pathlib import Path

from moecc.checkpoint.run.digests import step_removed
from moecc.checkpoint.trees.arrays import ZarrArrays
from moecc.errors import InputError


def array_key(*parts: str) -> str:
    """Return the name of an array in a saved tree, as Orbax joins its keys."""
    return ".".join(parts)


class StateReader(ZarrArrays):
    """Reads arrays of a saved state by name, any box at a time; thread-safe.

    Args:
      folder: the state, ``steps/N/state``.

    Raises:
      MachineError: tensorstore is missing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)

    def _unreadable(self, key: str, error: Exception) -> InputError:
        if self._folder.is_dir():
            return super()._unreadable(key, error)
        return InputError([step_removed(self._folder)])
