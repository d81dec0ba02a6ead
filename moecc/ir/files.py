"""Graph files, and the checkpoint that a graph names.

A relative name in a ``.moe`` file is taken from the folder of the file, so that a graph and its
checkpoint can be moved together; on standard input and output, and in memory, it is taken from
the working folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.text import parse

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


def read_graph(path: str) -> Graph:
    """Return the graph in a ``.moe`` file, or on standard input for ``-``.

    The checkpoint that it names is taken from the folder of the file.

    Raises:
      ParseError: the text is not a graph.
      InputError: the file cannot be read as text.
    """
    if path == "-":
        data, name = sys.stdin.buffer.read(), "<stdin>"
    else:
        if os.path.isdir(path):
            raise InputError(
                "is a folder, not a graph", where=path, hint="moecc import prints its graph"
            )
        if not os.path.isfile(path):
            raise InputError("no such file", where=path)
        data, name = Path(path).read_bytes(), path
    try:
        graph = parse(data.decode(), name)
    except UnicodeDecodeError as error:
        raise InputError(
            "not text: a .moe file is UTF-8", where=f"{name}: byte {error.start}"
        ) from None
    if path != "-":
        names_from_file(graph, path)
    return graph
