"""The registry of passes: those of installed packages, and those of a user's file.

A package registers passes under the entry point ``moecc.passes``: a mapping from a name to a
factory that imports and returns the class, or a pipeline template, so that listing names imports
nothing.  moecc's own passes are registered in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from moecc.errors import Problem, UsageError, nearest
from moecc.pipeline.options import unreadable
from moecc.pipeline.passes import Pass
from moecc.pipeline.template import PipelineTemplate
from moecc.support.user_files import LOADED as LOADED
from moecc.support.user_files import run_file

_KEBAB = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*\Z")


Factory = Callable[[], type[Pass] | PipelineTemplate]


@dataclass(frozen=True)
class Registry:
    """Passes by name.

    Attributes:
      factories: the factory of each pass.
      origins: the package or file of each pass.
    """

    factories: Mapping[str, Factory]
    origins: Mapping[str, str]

    def names(self) -> list[str]:
        """Return the names of all passes, sorted."""
        return sorted(self.factories)

    def __contains__(self, name: object) -> bool:
        return name in self.factories

    def get(self, name: str) -> type[Pass]:
        """Return the pass called `name`.

        Raises:
          UsageError: there is no such pass (the nearest name is suggested), or the class or
            template is invalid.
        """
        factory = self.factories.get(name)
        if factory is None:
            raise UsageError([unknown_pass(self, name)])
        found = factory()
        if isinstance(found, PipelineTemplate):
            self._refuse(name, found.class_name, found.faults())
            found = found.as_pass
        self._refuse(name, found.__name__, _faults(found, name))
        return found

    def _offers(self, name: str, thing: type[Pass] | PipelineTemplate) -> bool:
        return name in self.factories and self.factories[name]() is thing

    def _refuse(self, name: str, what: str, faults: Iterable[str]) -> None:
        problems = [Problem(fault, f"{self.origins[name]}, {what}") for fault in faults]
        if problems:
            raise UsageError(problems)

    def extended(self, factories: Mapping[str, Factory], origin: str) -> Registry:
        """Return this registry with more passes.

        Raises:
          UsageError: a name is taken.
        """
        taken = [
            Problem(
                f"the pass {name!r} is defined twice",
                origin,
                found=f"another in {self.origins[name]}",
                hint="rename one of them",
            )
            for name in factories
            if name in self.factories
        ]
        if taken:
            raise UsageError(taken)
        return Registry(
            {**self.factories, **factories}, {**self.origins, **dict.fromkeys(factories, origin)}
        )

    def with_file(self, path: Path, *, required: bool = True) -> Registry:
        """Return this registry with the passes that a Python file defines; the file is run.

        Args:
          path: the file.
          required: whether it is an error if it defines none.

        Raises:
          UsageError: it cannot be read or run, defines no pass, or a name is taken.
        """
        found = _passes_of(run_file(path))
        # A template that the file only imports does not count as one that it defines.
        found = {name: made for name, made in found.items() if not self._offers(name, made())}
        if required and not found:
            raise UsageError(
                "the file defines no pass",
                where=str(path),
                hint="a pass is a subclass of Pass with a name, or a PipelineTemplate",
            )
        extended = self.extended(found, str(path))
        for name in found:
            extended.get(name)
        return extended


@cache
def installed() -> Registry:
    """Return the passes of all installed packages.

    Raises:
      UsageError: two packages define a pass of the same name.
    """
    registry = Registry({}, {})
    for point in entry_points(group="moecc.passes"):
        origin = point.dist.name if point.dist is not None else point.value
        registry = registry.extended(point.load(), origin)
    return registry


def unknown_pass(registry: Registry, name: str) -> Problem:
    """Return the problem that there is no pass `name`, with the nearest name."""
    hint = nearest(name, registry.factories) or f"passes: {', '.join(registry.names())}"
    return Problem(f"unknown pass {name!r}", hint=hint)


def _faults(cls: type[Pass], name: str) -> Iterator[str]:
    """Yield why a class cannot be the pass `name`."""
    if cls.name != name:
        yield f"the pass registered as {name!r} has the name {cls.name!r}"
    if not _KEBAB.match(name):
        yield f"{name!r} is not in kebab-case"
    if not isinstance(getattr(cls, "summary", None), str):
        yield "it has no summary"
    if missing := sorted(cls.__abstractmethods__):
        yield f"it does not define {' and '.join(missing)}"
    if "__dataclass_fields__" not in vars(cls):
        yield "it is not a dataclass: @dataclass(frozen=True) is missing"
    else:
        yield from unreadable(cls)


def _passes_of(module: ModuleType) -> dict[str, Factory]:
    own = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, Pass)
        and thing.__module__ == module.__name__
        and hasattr(thing, "name")
    ]
    templates = [thing for thing in vars(module).values() if isinstance(thing, PipelineTemplate)]
    found: list[type[Pass] | PipelineTemplate] = [*own, *templates]
    return {thing.name: _returning(thing) for thing in found}


def _returning(thing: type[Pass] | PipelineTemplate) -> Factory:
    return lambda: thing
