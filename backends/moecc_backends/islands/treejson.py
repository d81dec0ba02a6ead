"""Trees of parameters as JSON: dictionaries, lists and tuples; every other container is not."""

from __future__ import annotations

from typing import Any

import jax

JsonTree = Any
"""``{"dict": …}``, ``{"list": …}``, ``{"tuple": …}``, None, or the number of a leaf."""


def to_json(treedef: Any) -> JsonTree:
    """Return the structure of a tree as JSON values, or None where it has other containers."""
    count = treedef.num_leaves
    numbered = jax.tree_util.tree_unflatten(treedef, list(range(count)))
    try:
        return {"tree": _written(numbered)}
    except TypeError:
        return None


def from_json(tree: JsonTree) -> Any:
    """Return the structure that `to_json` wrote."""
    return jax.tree_util.tree_structure(_read(tree["tree"]))


def _written(node: Any) -> JsonTree:
    kind = type(node)
    if node is None or kind is int:
        return node
    if kind is dict and all(type(key) is str for key in node):
        return {"dict": {key: _written(value) for key, value in node.items()}}
    if kind in (list, tuple):
        return {kind.__name__: [_written(value) for value in node]}
    raise TypeError(kind.__name__)


def _read(node: JsonTree) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, inner),) = node.items()
    if kind == "dict":
        return {key: _read(value) for key, value in inner.items()}
    made = [_read(value) for value in inner]
    return tuple(made) if kind == "tuple" else made
