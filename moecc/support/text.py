"""Human-readable numbers, and JSON that a terminal shows as it is."""

from __future__ import annotations

import json

from moecc.errors import is_shown


def size_text(count_bytes: float) -> str:
    """Return a human-readable number of bytes: ``1.38 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count_bytes) < 1000:
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.2f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.2f} TB"


def count_text(count: float) -> str:
    """Return a human-readable count: ``134.5 M``."""
    for unit in ("", " K", " M", " B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def amount(count: int, noun: str) -> str:
    """Return a number of things: ``1 device``, ``1,024 devices``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return JSON in which control and invisible characters, and only these, are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if is_shown(text):
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def with_article(name: str) -> str:
    """Return the name of a family after its article: ``a llama``, ``an olmoe``, ``a umt5``."""
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"
