"""Names for what no type checker knows: what a file says, and the type hints of a field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]
"""A table that was read from JSON, TOML or a header; whoever reads a key checks its type."""

JsonDict = dict[str, Any]
"""A table that is being made, to be written as JSON."""

Hint = Any
"""A type hint as `typing.get_type_hints` returns it: a class, or a generic alias of one."""
