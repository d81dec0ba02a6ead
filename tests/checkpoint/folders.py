"""What a folder of shards has in it, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.formats.open import open_checkpoint

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def problems(folder: Path) -> list[str]:
    """Return what opening a folder reports."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return [str(problem) for problem in caught.value.problems]


def index_of(weight_map: dict[str, str], total: object = None) -> dict[str, object]:
    """Return the index of a checkpoint in shards."""
    return {"metadata": {} if total is None else {"total_size": total}, "weight_map": weight_map}
