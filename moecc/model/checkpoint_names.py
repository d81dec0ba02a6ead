"""The checkpoint that a graph names: beside its file on disk, from the working folder in memory.

A relative name in a ``.moe`` file is taken from the folder of the file, so that a graph and its
checkpoint can be moved together; on standard input and output it is taken from the working folder.
"""

from __future__ import annotations

import os

from moecc.ir.graph import Graph

ATTRIBUTE = "checkpoint"


def names_from_file(graph: Graph, file: str) -> None:
    """Change a relative name, as read from `file`, to one from the working folder."""
    name, folder = _relative_name(graph), os.path.dirname(file)
    if name and folder:
        _set(graph, os.path.normpath(os.path.join(folder, name)))


def names_for_file(graph: Graph, file: str | None) -> None:
    """Change a relative name to one from the folder of `file`, which is about to be written."""
    name = _relative_name(graph)
    if not name or file is None or file == "-":
        return
    # Parents are resolved: a name that goes up leaves the folder that a link leads to.
    parent, last = os.path.split(os.path.abspath(name))
    folder = os.path.realpath(os.path.dirname(file) or os.curdir)
    _set(graph, os.path.relpath(os.path.join(os.path.realpath(parent), last), folder))


def _relative_name(graph: Graph) -> str:
    name = graph.attrs.get(ATTRIBUTE)
    return name if isinstance(name, str) and not os.path.isabs(name) else ""


def _set(graph: Graph, name: str) -> None:
    graph.attrs = {**graph.attrs, ATTRIBUTE: name}
