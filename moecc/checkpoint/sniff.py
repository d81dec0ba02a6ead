"""Detect the actual type of a file from its first bytes, whatever its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moecc.checkpoint.files import open_regular, read_into

SNIFFED_BYTES = 512

_CONVERT = (
    "moecc opens no pickle, because unpickling runs code; convert the model to safetensors "
    "in a sandbox, with a tool that you trust"
)
_FETCH = "the download did not fetch the content; fetch it again"


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of file: its name, a description for messages, and a way out."""

    name: str
    text: str
    hint: str | None = None


PICKLE = Kind("pickle", "a Python pickle", _CONVERT)
ZIP = Kind("zip", "a zip archive (PyTorch's own format is one, with a pickle inside)", _CONVERT)
LFS = Kind(
    "lfs", "a Git LFS pointer: three lines of text in place of the file", "run `git lfs pull`"
)
HTML = Kind("html", "an HTML page, perhaps an error page of a server", _FETCH)

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"GGUF", Kind("GGUF", "a GGUF file", "give the .gguf file itself as the source")),
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", ZIP),
    (b"\x89HDF\r\n\x1a\n", Kind("hdf5", "an HDF5 file (Keras, TensorFlow)", _CONVERT)),
    (b"\x93NUMPY", Kind("numpy", "a NumPy array file")),
    (b"version https://git-lfs", LFS),
    (b"\x1f\x8b", Kind("gzip", "a gzip archive", "unpack it first")),
    (b"\xfd7zXZ\x00", Kind("xz", "an xz archive", "unpack it first")),
    (b"\x28\xb5\x2f\xfd", Kind("zstd", "a zstd archive", "unpack it first")),
)
_PICKLE_PROTOCOLS = range(2, 6)
_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def sniff(head: bytes) -> Kind | None:
    """Return the kind of a file that begins with `head`, or None if unknown."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if len(head) >= 2 and head[0] == 0x80 and head[1] in _PICKLE_PROTOCOLS:
        return PICKLE
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return HTML
    return None


def sniff_file(path: Path) -> Kind | None:
    """Return the kind of a regular file.

    Raises:
      InputError: there is no such regular file.
      MachineError: it cannot be read.
    """
    descriptor, identity = open_regular(path)
    try:
        head = bytearray(min(SNIFFED_BYTES, identity.size_bytes))
        read_into(descriptor, memoryview(head), 0, path)
    finally:
        os.close(descriptor)
    return sniff(bytes(head))
