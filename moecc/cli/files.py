"""Files that commands read and write."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.cli.console import Format, report, say
from moecc.errors import InputError

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.model.open import Model


def graph_text(graph: Graph, path: str | None) -> str:
    """Return the text of `graph`, which then names its checkpoint from the folder of its file."""
    from moecc.ir.text import print_graph
    from moecc.model.open import names_for_file

    names_for_file(graph, path)
    return print_graph(graph)


def say_weights(model: Model, source: str) -> None:
    """Say which checkpoint a ``.moe`` file made a command open."""
    if source.endswith(".moe") and model.checkpoint is not None:
        say(f"note: {source} reads the weights of {model.checkpoint.path}")


def write_text(text: str, path: str | None, *, force: bool) -> None:
    """Write `text` to `path` atomically; to stdout if `path` is None or ``-``.

    Raises:
      InputError: the file exists and `force` is not set, or has no parent folder.
    """
    if path is None or path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    write_whole(path, text.encode(), force=force)


def write_artefact(
    kind: str, text: str, path: str | None, *, force: bool, format: Format, **more: object
) -> None:
    """Write what a command makes: to `path`, or to stdout, there as ``text`` of a JSON object.

    Args:
      kind: as of `moecc.cli.console.report`.
      text: the graph or program.
      path: of the file; stdout if it is None or ``-``.
      force: whether an existing file is replaced.
      format: with JSON an object is printed, whether there is a file or not.
      **more: what else the object says.

    Raises:
      InputError: as `write_text`.
    """
    to_file = path is not None and path != "-"
    if to_file or format is Format.human:
        write_text(text, path, force=force)
    if format is Format.json:
        told = {"output": path, "text": None} if to_file else {"output": None, "text": text}
        report(kind, {**told, **more}, str, format)


def check_writable(path: str, *, force: bool) -> None:
    """Raise InputError if `path` exists (without `force`) or has no parent folder."""
    place = Path(path)
    if place.is_dir():
        raise InputError("is a folder", where=path, hint="name a file in it")
    if place.exists() and not force:
        raise InputError("the file exists", where=path, hint="--force replaces it")
    if not place.resolve().parent.is_dir():
        raise InputError("the folder to write into does not exist", where=str(place.parent))


def write_whole(path: str, content: bytes, *, force: bool) -> None:
    """Write `content` to `path` through a temporary file in the same folder.

    Raises:
      InputError: see `check_writable`.
    """
    check_writable(path, force=force)
    place = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise
