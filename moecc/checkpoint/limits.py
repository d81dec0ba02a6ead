"""Limits of what is believed of a file, whatever its format: sizes and names."""

from __future__ import annotations

MAX_NAME_CHARACTERS = 1024

MAX_SIZE = (1 << 63) - 1
"""The largest size, offset or number of elements: what a signed 64-bit number holds."""


def name_fault(name: str) -> str | None:
    """Say what is wrong with the name of a tensor or file, or None."""
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"the name is longer than {MAX_NAME_CHARACTERS:,} characters"
    if not name.isprintable():
        return "the name has control or invisible characters"
    return None
