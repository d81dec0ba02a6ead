"""Lists in messages: runs of numbers shortened, long lists of problems cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from moecc.errors import Problem

MOST_PER_KIND = 20
"""How many problems of one kind are listed one by one."""


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending `numbers` with runs shortened: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def either(names: Sequence[str]) -> str:
    """Return `names`, of which there is at least one, as a choice: a, b or c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def both(names: Sequence[str]) -> str:
    """Return `names`, of which there is at least one, together: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def capped(
    problems: Iterable[Problem], one: str, several: str, most: int = MOST_PER_KIND
) -> Iterator[Problem]:
    """Yield the first problems, and one that counts the others: "7 more " and `several`."""
    more = 0
    for count, problem in enumerate(problems):
        if count < most:
            yield problem
        else:
            more += 1
    if more:
        yield Problem(f"{more} more {one if more == 1 else several}")
