"""Files that commands read and write."""

from __future__ import annotations

import os
import sys
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from moecc.cli.console import Format, report, say
from moecc.errors import InputError, MachineError, printable
from moecc.types.arrays import Array

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.model.open import Model


def graph_text(graph: Graph, path: str | None) -> str:
    """Return the text of `graph`, which then names its checkpoint from the folder of its file."""
    from moecc.ir.printer import print_graph
    from moecc.model.checkpoint_names import names_for_file

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


def read_inputs(path: str, graph: Graph) -> dict[str, Array]:
    """Return the inputs of `graph` from a file.

    A ``.npy`` file holds the token ids of a model with no other input, ``[batch, seq]`` or
    ``[seq]``; a ``.npz`` file holds an array for each input, by name.

    Raises:
      InputError: it is no such file, or its content does not match the graph.
    """
    from moecc.model.inputs import check_inputs

    if not os.path.isfile(path):
        raise InputError("no such file", where=path)
    if path.endswith(".npz"):
        return check_inputs(graph, _load_all(path), path)
    with open(path, "rb") as file:
        return check_inputs(graph, {next(iter(graph.inputs)): _load(file, path)}, path)


_FOREIGN = (
    ValueError, EOFError, OSError, SyntaxError, TypeError, OverflowError, RecursionError,
    NotImplementedError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What NumPy, zipfile and the parser of headers raise for files that are none."""


def _load_all(path: str) -> dict[str, Array]:
    # Pickled objects are code; NumPy rejects them by default.
    try:
        with open(path, "rb") as file, _quiet(), np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except _FOREIGN as error:
        raise InputError(f"not a .npz file: {printable(str(error))}", where=path) from None
    except MemoryError:
        raise MachineError("the arrays do not fit into memory", where=path) from None
    # A member that is no .npy file comes as bytes.
    if strange := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise InputError("a member is not an array", where=path, found=printable(strange[0]))
    return found


def _quiet() -> warnings.catch_warnings[None]:
    """Silence what NumPy says of headers of Python 2, which it reads all the same."""
    return warnings.catch_warnings(action="ignore")


def _load(file: IO[bytes], path: str) -> Array:
    # Pickled objects are code; NumPy rejects them by default.
    try:
        with _quiet():
            loaded = np.lib.format.read_array(file, allow_pickle=False)
    except _FOREIGN as error:
        raise InputError(f"not a .npy file: {printable(str(error))}", where=path) from None
    except MemoryError:
        raise MachineError("the array does not fit into memory", where=path) from None
    return loaded
