"""How objects show themselves: in a line at a prompt, as a small table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable

Rows = Iterable[tuple[str, str]]
"""Names and texts; rows without a text are left out."""


def brief(kind: str, rows: Rows) -> str:
    """Return an object in a line, ``<moecc.Graph model, nodes 120>``; an empty name is left out."""
    said = [f"{name} {text}".strip() for name, text in rows if text]
    return f"<{' '.join([kind, ', '.join(said)]).strip()}>"


def facts_table(rows: Rows) -> str:
    """Return rows of a name and a text as a table of HTML, which are escaped."""
    from moecc.support.page import render

    return render("facts.html", rows=[(name, text) for name, text in rows if text])
