"""Files with the inputs of a model: arrays as NumPy writes them."""

from __future__ import annotations

import os
import tokenize
import warnings
import zipfile
import zlib
from typing import IO, TYPE_CHECKING

import numpy as np

from moecc.errors import InputError, MachineError, printable
from moecc.types import Array

if TYPE_CHECKING:
    from moecc.ir.graph import Graph


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
