"""Layouts of tests: rules in a short spelling, as the TOML of a layout's file."""

from __future__ import annotations

import re

_RULE = re.compile(r"(?:(param)\s+)?(\w+)(?:\s+with\s+(\w+))?\s*=\s*([\w*]+)(\s*\?)?")


def layout_text(*rules: str) -> str:
    """Return the text of a layout: ``expert with slot = data``, ``param embed = data*fsdp ?``."""
    lines = []
    for rule in rules:
        match = _RULE.fullmatch(rule.strip())
        assert match is not None, rule
        kind, axis, beside, mesh, optional = match.groups()
        keys = {"axis": f'"{axis}"', "mesh": str(mesh.split("*")).replace("'", '"')}
        keys |= {"with": f'"{beside}"'} if beside else {}
        keys |= {"stored": "true"} if kind else {}
        keys |= {"optional": "true"} if optional else {}
        lines.append("{ " + ", ".join(f"{k} = {v}" for k, v in keys.items()) + " },")
    return "\n".join(["rules = [", *lines, "]"]) + "\n"
