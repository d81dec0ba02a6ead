"""What JSON can say."""

from __future__ import annotations

from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value that was read; what is only written is an ``object`` that the writer takes."""

JsonObject: TypeAlias = "dict[str, Json]"
