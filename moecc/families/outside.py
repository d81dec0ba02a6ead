"""Families from outside: of installed packages, and of a user's own file.

A package registers each `Family` under the entry point ``moecc.families``; a file of one's own
holds it in a variable, and is given to a command with ``--load``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecc.errors import Problem, UsageError, raise_problems
from moecc.families.config import ModelConfig, TensorNames
from moecc.families.graphs.parameters import GraphRequest
from moecc.families.registry import CONFIGS, ORIGINS
from moecc.ir.graph import Graph
from moecc.support.user_files import run_file


@dataclass(frozen=True)
class Family:
    """A model architecture: how its config is read, and how its graph is built.

    Attributes:
      config: the class of its config, derived from `ModelConfig` or from that of a similar family.
      build: builds the graph of a config; None where the builder of a base class does.
      names: the names of its tensors that moecc looks for by itself: embedding and head.
      shrink: returns a config with small sizes, for checks of passes; None where that of a base
        class does, or where checks of passes have no use for one.
    """

    config: type[ModelConfig]
    build: Callable[[Any, GraphRequest], Graph] | None = None
    names: TensorNames | None = None
    shrink: Callable[[Any], ModelConfig] | None = None

    def register(self, origin: str) -> None:
        """Add the family to those that moecc reads and writes.

        Args:
          origin: the package or file that it is from.

        Raises:
          UsageError: its name is taken, or something that it needs is missing.
        """
        where = f"{origin}, {_title(self.config)}"
        problems = [Problem(fault, where) for fault in self._faults(origin)]
        raise_problems(problems, UsageError)
        config: Any = self.config
        name = config.model_type
        CONFIGS[name], ORIGINS[name] = config, origin
        if self.build is not None:
            config.builder = staticmethod(self.build)
        if self.names is not None:
            config.names = self.names
        if self.shrink is not None:
            config.shrunk = self.shrink

    def _faults(self, origin: str) -> Iterator[str]:
        """Yield why it cannot be added."""
        config: object = self.config
        if not isinstance(config, type) or not issubclass(config, ModelConfig):
            yield "its config is no subclass of ModelConfig"
            return
        needed = ("model_type", "architecture", "defaults")
        missing = [name for name in needed if not hasattr(config, name)]
        if missing:
            yield f"its config has no {' and no '.join(missing)}"
            return
        if "__dataclass_fields__" not in vars(config):
            yield "its config is not a dataclass: @dataclass(frozen=True, kw_only=True) is missing"
        previous = ORIGINS.get(config.model_type, "moecc")
        if CONFIGS.get(config.model_type, config) is not config and previous != origin:
            yield f"the family {config.model_type!r} is defined twice; another is in {previous}"
        if self.build is None and config.builder is None and not config.graphs:
            yield "nothing builds its graph: Family(build=…) is missing"


def _title(config: object) -> str:
    return getattr(config, "__name__", repr(config))


def add_families(file: str) -> int:
    """Run a Python file, add the families that it holds in variables, and return their number.

    Raises:
      UsageError: the file cannot be run; see `Family.register`.
    """
    module = run_file(Path(file))
    families = [thing for thing in vars(module).values() if isinstance(thing, Family)]
    for family in families:
        family.register(file)
    return len(families)
