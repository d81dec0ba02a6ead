"""Parse attribute values."""

from __future__ import annotations

import json
import re

from moecc.errors import InputError
from moecc.ir.ops import Attr, OpDef
from moecc.types.tensor import is_name

_ATTR = re.compile(
    r"\s*([A-Za-z_]\w*)\s*=\s*"
    r"(\([^()]*\)|\"(?:[^\"\\]|\\.)*\"|[^,()\"\s]+)\s*(,|\Z)"
)


def parse_attrs(entry: OpDef, text: str) -> dict[str, object]:
    """Return the attributes of `entry` parsed from `text`, braces included.

    Raises:
      InputError: the text does not parse; kinds are checked by `OpDef.complete`.
    """
    inner, pos = text[1:-1].rstrip(), 0
    attrs: dict[str, object] = {}
    while pos < len(inner):
        match = _ATTR.match(inner, pos)
        if match is None:
            raise InputError("not an attribute", expected="name=value", found=inner[pos:])
        name, value, _ = match.groups()
        if name in attrs:
            raise InputError(f"attribute {name!r} is defined twice")
        attrs[name] = _parse_value(entry.attrs.get(name), value)
        pos = match.end()
    return attrs


def _parse_value(spec: Attr | None, text: str) -> object:
    kind = spec.kind if spec is not None else ""
    if kind in ("str", "axis") and text[0] not in '("':
        # A word is never parsed as a number: an axis may well be called inf.
        return text
    if kind in ("axes", "words"):
        # One axis needs no parentheses, so that {over=embed} reads well.
        return tuple(_parts(text[1:-1])) if text[0] == "(" else (text,)
    return _parse_tuple(text[1:-1]) if text[0] == "(" else _parse_scalar(text)


def _parts(inner: str) -> list[str]:
    return [p.strip() for p in inner.split(",") if p.strip()]


def _parse_tuple(inner: str) -> tuple[object, ...]:
    parts = _parts(inner)
    if parts and all("=" in p for p in parts):
        pairs = (p.split("=", 1) for p in parts)
        return tuple((n.strip(), _parse_size_word(s.strip())) for n, s in pairs)
    return tuple(_parse_scalar(p) for p in parts)


def _parse_size_word(text: str) -> object:
    return text if is_name(text) or not text else _parse_scalar(text)


def _parse_scalar(text: str) -> object:
    if text[0] == '"':
        try:
            return json.loads(text)
        except ValueError:
            raise InputError("not a string", found=text) from None
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if len(text) <= 20 else float(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
