"""The folder of a converted function of JAX: its graph reads the arrays beside it."""

from __future__ import annotations

import os
from pathlib import Path

from moecc.checkpoint.folder import CONFIG_NAME as CONFIG_NAME
from moecc.checkpoint.jsonfile import read_json_object
from moecc.errors import MoeccError

GRAPH_NAME = "graph.moe"
MODEL_TYPE = "jax_function"
"""What its ``config.json`` calls it."""

_MAX_CONFIG_BYTES = 16 << 20


def is_function_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a converted function."""
    folder = Path(path)
    if not (folder / GRAPH_NAME).is_file() or not (folder / CONFIG_NAME).is_file():
        return False
    try:
        config = read_json_object(folder / CONFIG_NAME, limit_bytes=_MAX_CONFIG_BYTES)
    except MoeccError:
        return False
    return config.get("model_type") == MODEL_TYPE
