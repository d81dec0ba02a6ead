"""Numbers of experts, as options list them."""

from __future__ import annotations

from moecc.errors import Problem


def expert_numbers(text: str) -> tuple[int, ...] | Problem:
    """Return the numbers in ``0,2,5``, in ascending order; none in an empty text."""
    words = text.split(",") if text else []
    if not all(word.isascii() and word.isdigit() and len(word) < 7 for word in words):
        return Problem("not numbers of experts", "experts", "0,2,5", text)
    numbers = tuple(int(word) for word in words)
    if list(numbers) != sorted(set(numbers)):
        return Problem("not in ascending order without repetition", "experts", "0,2,5", text)
    return numbers
