"""Passes and families of a user's own files, beside those that are installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moecc.pipeline.registry import Registry, installed


def registry_with(files: Sequence[str]) -> Registry:
    """Return the installed passes and those defined by `files`, and add the files' families.

    Raises:
      UsageError: a file cannot be run or defines nothing, or a name is taken.
    """
    registry = installed()
    for file in files:
        from moecc.families.outside import add_families

        registry = registry.with_file(Path(file), required=not add_families(file))
    return registry
