"""A row of the table of faults."""

from __future__ import annotations

from dataclasses import dataclass

from .place import Act


@dataclass(frozen=True)
class Row:
    """A fault: its number in the catalogue, a title, the exit code, words, and the cases."""

    number: int
    title: str
    code: int
    words: str
    cases: tuple[Act, ...]


def row(number: int, title: str, code: int, words: str, *cases: Act) -> Row:
    """Return a row; `words` are a pattern."""
    return Row(number, title, code, words, cases)
