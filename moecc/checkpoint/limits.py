"""Limits on untrusted sizes and names, shared by all formats."""

from __future__ import annotations

from pathlib import PureWindowsPath

MAX_NAME_CHARACTERS = 1024

MAX_SIZE = (1 << 63) - 1
"""The largest size, offset or number of elements: the range of a signed 64-bit integer."""


def name_fault(name: str) -> str | None:
    """Return the problem of a tensor or file name, or None."""
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"the name is longer than {MAX_NAME_CHARACTERS:,} characters"
    if not name.isprintable():
        return "the name has control or invisible characters"
    return None


def is_recordable(name: str) -> bool:
    """Whether a manifest allows this file name: printable, and inside the folder everywhere."""
    path = PureWindowsPath(name)
    outside = path.drive or path.root or ".." in path.parts or "\\" in name
    return not (name_fault(name) or outside)
