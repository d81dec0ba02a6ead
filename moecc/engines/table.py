"""The table of engines: what each reads of each family, with version and source."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from moecc.support.untyped import Json


@dataclass(frozen=True)
class Engine:
    """An engine in the version that was looked at.

    Attributes:
      name: as its makers spell it.
      version: the version.
      checked: ``run`` if its logits were compared, ``read`` if its code was read.
      source: the test, or the package, that the facts are from.
    """

    name: str
    version: str
    checked: str
    source: str


@dataclass(frozen=True)
class Reading:
    """The conditions under which an engine reads a family.

    Attributes:
      needs: without these it refuses the checkpoint.
      silent: without these it loads it and computes another function.
      gguf: the architecture of GGUF that it reads instead of a folder; empty if it reads folders.
      never: why it reads none of moecc's checkpoints of the family; empty if it may.
    """

    needs: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    gguf: str = ""
    never: str = ""


@dataclass(frozen=True)
class Table:
    """The engines, and for each family what they read of it."""

    engines: tuple[Engine, ...]
    reads: Mapping[str, Mapping[str, Reading]]


@cache
def engine_table() -> Table:
    """Return the table that comes with moecc."""
    text = files("moecc.engines").joinpath("table.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    engines = tuple(
        Engine(name, row["version"], row["checked"], row["source"])
        for name, row in data["engines"].items()
    )
    reads = {
        family: {name: _reading(row) for name, row in rows.items()}
        for family, rows in data["reads"].items()
    }
    return Table(engines, reads)


def _reading(row: Json) -> Reading:
    needs, silent = (tuple(row.get(key, ())) for key in ("needs", "silent"))
    return Reading(needs, silent, row.get("as", ""), row.get("never", ""))
