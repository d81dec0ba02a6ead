"""What is kept of a source's model card: licence, language, data sets, the model it came from.

A card begins with metadata in YAML, of which only plain scalars and lists of them are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moecc.checkpoint.files import file_fault, read_bounded
from moecc.errors import InputError

CARD_NAME = "README.md"
SCALARS = ("license", "license_name", "license_link")
LISTS = ("language", "datasets")
_MAX_CARD_BYTES = 4 << 20

Kept = Mapping[str, tuple[str, ...]]
"""The values of each key that is kept; a scalar is one value."""


def read_card(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return what is kept of the card of a folder; empty without one."""
    card = folder / CARD_NAME
    if not card.is_file() or file_fault(card, folder):
        return {}
    try:
        text = read_bounded(card, _MAX_CARD_BYTES).decode("utf-8")
    except (InputError, UnicodeDecodeError):
        return {}  # a card is for people: a broken one does not stop a conversion
    return front_matter(text)


def front_matter(text: str) -> dict[str, tuple[str, ...]]:
    """Return the values of `SCALARS` and `LISTS` in the front matter of a card."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), len(lines))
    found: dict[str, tuple[str, ...]] = {}
    for at, line in enumerate(lines[1:end], 1):
        key, colon, value = line.partition(":")
        if colon and key in (*SCALARS, *LISTS):
            items = _items(value.strip()) or _listed(lines[at + 1 : end])
            found[key] = tuple(items[:1] if key in SCALARS else items)
    return {key: values for key, values in found.items() if values}


def _items(text: str) -> list[str]:
    """Return the members of a value on one line: ``mit``, ``[en, de]``."""
    if text.startswith("[") and text.endswith("]"):
        return [item for part in text[1:-1].split(",") if (item := _unquoted(part.strip()))]
    item = _unquoted(text)
    return [item] if item else []


def _listed(lines: Sequence[str]) -> list[str]:
    """Return the items of a list that begins on the next line."""
    items = []
    for line in lines:
        if not line.strip().startswith("- "):
            break
        items.append(_unquoted(line.strip().removeprefix("- ").strip()))
    return [item for item in items if item]


def _unquoted(item: str) -> str:
    if len(item) >= 2 and item[0] == item[-1] and item[0] in "'\"":
        return item[1:-1]
    return item.split(" #")[0].strip()
