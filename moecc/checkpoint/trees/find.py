"""Find the folder of the arrays of a JAX checkpoint, in one of steps or of items."""

from __future__ import annotations

import os
from pathlib import Path

METADATA = "_METADATA"
"""The file of Orbax that says what arrays there are."""
FILE = "checkpoint"
"""The file of T5X."""
ITEMS = ("items", "default", "state", "params", "model_params", "pytree")
"""The folders that programs keep the tree in, beside other items of a step."""
_STEP = "checkpoint_"


def find_tree(folder: Path) -> Path | None:
    """Return the folder of the arrays of a checkpoint of Orbax or T5X in `folder`, or None."""
    return _find_orbax(folder) or _find_t5x(folder)


def _find_orbax(folder: Path) -> Path | None:
    """Return the folder of the tree in a checkpoint, a step, or a folder of steps: its last."""
    names = {int(n): n for n in os.listdir(folder) if n.isdecimal() and n.isascii()}
    steps = (folder / names[number] for number in sorted(names, reverse=True))
    return next((tree for place in (folder, *steps) if (tree := _tree_in(place))), None)


def _tree_in(folder: Path) -> Path | None:
    places = (folder, *(folder / name for name in ITEMS))
    return next((place for place in places if (place / METADATA).is_file()), None)


def _find_t5x(folder: Path) -> Path | None:
    """Return the folder of a step, or the last one of a folder of steps."""
    if (folder / FILE).is_file():
        return folder
    names = [n for n in os.listdir(folder) if n.startswith(_STEP)]
    steps = {int(n[len(_STEP) :]): n for n in names if n[len(_STEP) :].isdecimal()}
    places = (folder / steps[number] for number in sorted(steps, reverse=True))
    return next((place for place in places if (place / FILE).is_file()), None)
