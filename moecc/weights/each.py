"""A short text for stacks of many expressions that differ in a number.

``each(layer=0..2, source("layers.{layer}.w" : f32[embed=4]))`` is the stack, along ``layer``, of
the three expressions obtained with 0, 1 and 2 substituted for ``{layer}``.
They can be nested.
"""

from __future__ import annotations

from collections.abc import Sequence

from moecc.types.ranges import Progression, varying


def in_short(texts: Sequence[str], axis: str) -> str | None:
    """Return ``axis=first..last, text`` for the expressions `texts`, or None if there is none."""
    mark = f"{{{axis}}}"
    if len(texts) < 2 or any(mark in text for text in texts):
        return None
    found = varying(texts)
    if found is None or len(set(found[1].values())) != 1:
        return None
    pieces, numbers = found
    spelled = "".join(mark if i in numbers else piece for i, piece in enumerate(pieces))
    return f"{axis}={next(iter(numbers.values()))}, {spelled}"


def in_full(text: str, axis: str, numbers: Progression) -> list[str]:
    """Return the texts that ``each`` expands to."""
    mark = f"{{{axis}}}"
    return [text.replace(mark, str(numbers.start + i * numbers.step)) for i in range(numbers.count)]
