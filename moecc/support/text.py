"""Human-readable numbers, and JSON that a terminal shows as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, isfinite, log

from moecc.errors import Problem, is_shown


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


def digits_text(number: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def exponential_text(exponent: float, times: float = 1.0) -> str:
    """Return the power of ten above `times` · exp(`exponent`), beyond floats, too: ``1e-3908``."""
    return f"1e{ceil((exponent + log(times)) / log(10))}"


def amount(count: int, noun: str, nouns: str = "") -> str:
    """Return a number of things: ``1 device``, ``1,024 devices``, ``2 passes``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {nouns or f'{noun}s'}"


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return JSON in which control and invisible characters, and only these, are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if is_shown(text):
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def finite_json(value: object) -> object:
    """Return a JSON value with null in place of what is not finite, which JSON cannot say."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_json(inner) for key, inner in value.items()}
    return [finite_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def with_article(name: str) -> str:
    """Return the name of a family after its article: ``a llama``, ``an olmoe``, ``a umt5``."""
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


# Lists in messages: runs of numbers shortened, long lists of problems cut.

MOST_PER_KIND = 20
"""How many problems of one kind are listed one by one."""


def merge_remarks(remarks: Iterable[str]) -> list[str]:
    """Return the remarks, with equal texts at several layers of a stack merged into one line."""
    places: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        where, _, text = remark.partition(": ")
        stack = re.match(r"((?:\w+\.)?layers)\.\d", where)
        key, layer = ((stack[1], text), where) if stack else (("", remark), "")
        places.setdefault(key, []).append(layer)
    return [
        text if not where[0]
        else f"{where[0]}: {text}" if len(where) == 1
        else f"{where[0]} … {where[-1]} ({len(where)}): {text}"
        for (_, text), where in places.items()
    ]  # fmt: skip


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


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def capped(
    problems: Iterable[Problem], singular: str, plural: str, most: int = MOST_PER_KIND
) -> Iterator[Problem]:
    """Yield the first problems, and one that counts the others: "7 more " and `several`."""
    more = 0
    for count, problem in enumerate(problems):
        if count < most:
            yield problem
        else:
            more += 1
    if more:
        yield Problem(f"{more} more {singular if more == 1 else plural}")


# How objects show themselves: in a line at a prompt, as a small table in a notebook.

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


def time_text(seconds: float) -> str:
    """Return a time in its largest unit: ``12.3 days``, ``6.3 min``, ``0.8 ms``."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"


def duration_text(seconds: float) -> str:
    """Return a duration in hours, minutes and seconds: ``2 h 5 min``, ``3 min 20 s``, ``4 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
