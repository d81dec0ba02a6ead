"""Files that commands read and write."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from moecc.errors import InputError, MachineError


def write_text(text: str, path: str | None, *, force: bool) -> None:
    """Write `text` to `path`, whole or not at all; to stdout where `path` is None or ``-``.

    Raises:
      InputError: the file exists and `force` is not given, or has no parent folder.
    """
    if path is None or path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    write_whole(path, text.encode(), force=force)


def check_writable(path: str, *, force: bool) -> None:
    """Raise InputError if `path` is there already (without `force`) or has no parent folder."""
    place = Path(path)
    if place.is_dir():
        raise InputError("is a folder", where=path, hint="name a file in it")
    if place.exists() and not force:
        raise InputError("the file exists", where=path, hint="--force replaces it")
    if not place.resolve().parent.is_dir():
        raise InputError("the folder to write into does not exist", where=str(place.parent))


def write_whole(path: str, content: bytes, *, force: bool) -> None:
    """Write `content` to `path` through a temporary file beside it.

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


def read_tokens(path: str, vocab: int) -> np.ndarray[Any, Any]:
    """Return the token ids in a ``.npy`` file as ``[batch, seq]``.

    Raises:
      InputError: it is no such file, not whole numbers, or a number is not in the vocabulary.
    """
    if not os.path.isfile(path):
        raise InputError("no such file", where=path)
    with open(path, "rb") as file:
        tokens = _load(file, path)
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2) or not tokens.size:
        raise InputError(
            "not token ids", where=path, expected="whole numbers, [batch, seq] or [seq]",
            found=f"{tokens.dtype}{list(tokens.shape)}",
        )  # fmt: skip
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise InputError(
            "a token id is outside the vocabulary", where=path,
            expected=f"0 <= id < {vocab}", found=str(low if low < 0 else high),
        )  # fmt: skip
    return np.atleast_2d(tokens).astype(np.int32)


def _load(file: IO[bytes], path: str) -> np.ndarray[Any, Any]:
    # Pickled objects are code; NumPy refuses them unless asked.
    try:
        loaded = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        raise InputError(f"not a .npy file: {error}", where=path) from None
    except MemoryError:
        raise MachineError("the array does not fit into memory", where=path) from None
    return loaded
