"""The folder of a converted function of JAX: its graph reads the arrays beside it."""

from __future__ import annotations

import os
from pathlib import Path

from moecc.checkpoint.folder import CONFIG_NAME as CONFIG_NAME
from moecc.checkpoint.jsonfile import read_json_object
from moecc.errors import MoeccError
from moecc.ir.graph import Graph

GRAPH_NAME = "graph.moe"
MODEL_TYPE = "jax_function"
"""What its ``config.json`` calls it."""

GRAPH = "jax"
"""The name of the graph of its blocks."""

_MAX_CONFIG_BYTES = 16 << 20


def function_name(graph: Graph) -> str | None:
    """Return the function whose blocks a graph has, or None where it is of a family."""
    name = graph.attrs.get("function")
    return str(name) if graph.name == GRAPH and name is not None else None


def is_function_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a converted function."""
    folder = Path(path)
    if not os.path.isfile(folder / GRAPH_NAME) or not os.path.isfile(folder / CONFIG_NAME):
        return False
    try:
        config = read_json_object(folder / CONFIG_NAME, limit_bytes=_MAX_CONFIG_BYTES)
    except MoeccError:
        return False
    return config.get("model_type") == MODEL_TYPE
