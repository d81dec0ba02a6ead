"""What a backend gives of a step that it exported."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from moecc.support.untyped import Json


class LoadedStep(Protocol):
    """A program of a saved step.

    Attributes:
      platforms: what it was compiled for.
      devices: how many it runs on.
      arguments: shapes and types of what it takes, parameters and inputs by name.
    """

    platforms: tuple[str, ...]
    devices: int
    arguments: Json

    def __call__(self, *arguments: Json) -> Json:
        """Run the program. Raises InputError for other arguments."""
        ...


@runtime_checkable
class StepLoader(Protocol):
    """A backend that reads programs which it exported."""

    def load_step(self, data: bytes, where: str) -> LoadedStep:
        """Return a program. Raises InputError, MachineError."""
        ...
