"""The journal of a run as series over its steps, for reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moecc.checkpoint.problems import describe
from moecc.checkpoint.run.layout import (
    METRICS,
    best_step,
    is_count,
    is_number,
    is_run,
    run_stages,
    saved_steps,
)
from moecc.errors import InputError
from moecc.support.shown import brief, facts_table
from moecc.support.untyped import JsonDict
from moecc.train.alarms import Alarm, Watch
from moecc.train.journal import read_journal
from moecc.types.arrays import Doubles

MOST_POINTS = 1000
"""Longer series are means of so many parts."""

_METRIC = "metric."
_BY_NAME = ("held_out", "spread")
"""The keys of a line whose values have names of their own."""

_UNSERIAL = ("left_out", "faults")
"""The keys of a line that no series is made of."""


CURVES = {
    "loss": "Loss of each step",
    "loss.cross_entropy": "Cross entropy of each step, nats a token",
    "gradient_norm": "Norm of the gradients",
    "rate": "Learning rate",
}
ROUTER_CURVES = {
    "entropy": "Entropy of the router, nats",
    "dropped": "Share of choices without a slot",
    "max_violation": "Largest load over the mean, less 1",
    "logit_square": "Mean square of the router's logits",
}


@dataclass(frozen=True)
class Series:
    """Values over steps.

    Attributes:
      steps: ``f64[point]``.
      values: ``f64[point]``, or ``f64[point, expert]``.
    """

    steps: Doubles
    values: Doubles

    def thinned(self) -> Series:
        """Return the series with at most `MOST_POINTS` points, each the mean of a part."""
        if len(self.steps) <= MOST_POINTS:
            return self
        parts = np.array_split(np.arange(len(self.steps)), MOST_POINTS)
        steps = np.array([self.steps[part].mean() for part in parts])
        return Series(steps, np.stack([self.values[part].mean(axis=0) for part in parts]))


@dataclass(frozen=True)
class RunSeries:
    """What a run measured.

    Attributes:
      name: of its folder.
      lines: of its journal.
      facts: for people: steps, tokens, recipe and the like.
    """

    name: str
    lines: tuple[JsonDict, ...]
    facts: dict[str, str]

    def __repr__(self) -> str:
        return brief("moecc.Run", [("", self.name), *self.facts.items()])

    def _repr_html_(self) -> str:
        alarms = (("alarm", str(alarm)) for alarm in self.alarms())
        return facts_table([("run", self.name), *self.facts.items(), *alarms])

    @cached_property
    def stepped(self) -> list[JsonDict]:
        """The lines of steps whose update was made."""
        return [line for line in self.lines if "loss" in line and "skipped" not in line]

    def scalar(self, name: str) -> Series | None:
        """Return a number over the steps, or None where it was not measured."""
        found = [(line["step"], line[name]) for line in self.stepped if name in line]
        return _series(found)

    @property
    def held_out(self) -> dict[str, Series]:
        """The held-out losses by the name of the text."""
        lines = [line for line in self.lines if "held_out" in line]
        names = dict.fromkeys(name for line in lines for name in line["held_out"])
        pairs = {
            name: [
                (line["step"], found[name]) for line in lines if name in (found := line["held_out"])
            ]
            for name in names
        }
        return {name: s for name, found in pairs.items() if (s := _series(found)) is not None}

    @cached_property
    def layers(self) -> list[str]:
        """The routed layers, in the order of the model."""
        names = {
            name.removeprefix(_METRIC).rpartition(".")[0]
            for line in self.stepped[:1]
            for name in line
            if name.startswith(_METRIC)
        }
        return sorted(names, key=lambda name: list(map(_place, name.split("."))))

    def of_layer(self, layer: str, kind: str) -> Series | None:
        """Return what was measured of a layer: ``loads``, ``entropy``, ``dropped``."""
        return self.scalar(f"{_METRIC}{layer}.{kind}")

    def spread(self, layer: str) -> Series | None:
        """Return how far the experts of a layer were apart, at each evaluation."""
        lines = (line for line in self.lines if layer in line.get("spread", {}))
        return _series([(line["step"], line["spread"][layer]) for line in lines])

    def alarms(self) -> Iterator[Alarm]:
        """Yield what went wrong in routers."""
        watch = Watch()
        for line in self.stepped:
            yield from watch(line["step"], line)


def _series(found: Sequence[tuple[int, Any]]) -> Series | None:
    if not found:
        return None
    steps, values = zip(*found, strict=True)
    return Series(np.array(steps, np.float64), np.array(values, np.float64)).thinned()


def _place(part: str) -> tuple[int, str]:
    """Return the place of a part of a layer's name among others: numbers first, by their value."""
    is_index = part.isascii() and part.isdecimal() and len(part) < 10
    return (int(part), "") if is_index else (sys.maxsize, part)


def _check_lines(lines: Sequence[JsonDict], path: Path) -> None:
    """Check the values of a journal. Raises InputError with the first line that is wrong."""
    lengths: dict[str, int | None] = {}
    for number, line in enumerate(lines, 1):
        for key, expected in _line_faults(line, lengths):
            raise InputError(
                "not a line of a journal", where=f"{path}:{number}: {key}", expected=expected,
                found=describe(line.get(key)),
            )  # fmt: skip


def _is_scalar(key: str) -> bool:
    """Return whether the values of a key are single numbers."""
    of_router = key.startswith(_METRIC) and key.rpartition(".")[2] in ROUTER_CURVES
    return of_router or key == "held_out" or key in CURVES


def _line_faults(line: JsonDict, lengths: dict[str, int | None]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a line whose values are wrong, and what they should be.

    Args:
      line: the line.
      lengths: of the lists of earlier lines by key, None for numbers; keys of this one are added.
    """
    for key in ("step", "tokens"):
        if (key == "step" or key in line) and not is_count(line.get(key)):
            yield key, "an integer, 0 or more"
    for key, value in line.items():
        if key in _UNSERIAL:
            continue
        values = value if key in _BY_NAME else {"": value}
        if not isinstance(values, dict):
            yield key, "an object"
            continue
        for name, entry in values.items():
            entries = entry if isinstance(entry, list) else [entry]
            length = len(entry) if isinstance(entry, list) else None
            is_listed = key == "spread" or key.endswith(".loads")
            if not entries or not all(e is None or is_number(e) for e in entries):
                yield key, "numbers, or lists of numbers"
            elif _is_scalar(key) and length is not None:
                yield key, "a number"
            elif is_listed and length is None:
                yield key, "lists of numbers"
            elif lengths.setdefault(f"{key} {name}", length) != length:
                yield key, "as many numbers as in earlier lines"


def read_run(path: Path) -> RunSeries:
    """Return what a run measured.

    Raises:
      InputError: it is no run, has measured nothing, or its journal is damaged.
    """
    if not is_run(path):
        raise InputError("this is not the folder of a run", where=str(path))
    lines = tuple(read_journal(path / METRICS))
    _check_lines(lines, path / METRICS)
    if not any("loss" in line for line in lines):
        raise InputError("the run has made no step", where=str(path))
    stage = run_stages(path)[-1]
    steps = saved_steps(path)
    best = best_step(steps)
    last = max(line["step"] for line in lines)
    tokens = max(line.get("tokens", 0) for line in lines)
    facts = {
        "source": str(stage.get("source", "")),
        "pipeline": str(stage.get("pipeline", "")) or "none",
        "steps": f"{last:,}",
        "tokens": f"{tokens:,}",
        "best held out": "none" if best is None else f"{best.loss:.4f} at step {best.number:,}",
        "recipe": str(stage.get("recipe", ""))[:19],
    }
    return RunSeries(path.resolve().name, lines, facts)
