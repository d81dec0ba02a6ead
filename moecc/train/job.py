"""What a backend trains: a recipe, a model, its data and where it begins; and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from moecc.ir.graph import Graph
from moecc.train.data.batches import Batches
from moecc.train.events import Event, Reason
from moecc.train.recipe import Recipe
from moecc.train.state import Weights
from moecc.weights.evaluate import Reader


@dataclass(frozen=True)
class Beginning:
    """Where the first step begins.

    Attributes:
      weights: how each parameter is made, by its canonical name.
      read: reads the tensors of the source.
      moments: how moments are made that are carried over, by their names in a state.
    """

    weights: Weights
    read: Reader
    moments: Weights


@dataclass(frozen=True)
class TrainJob:
    """A run that is to begin, or to go on.

    Attributes:
      run: its folder.
      recipe: what decides it.
      digest: of the recipe.
      graph: the canonical graph of the model.
      batches: its data.
      create: makes the folder; it is there already where the run goes on.
      begin: opens what the first step begins from, where nothing is saved yet.
    """

    run: Path
    recipe: Recipe
    digest: str
    graph: Graph
    batches: Batches
    create: Callable[[], None]
    begin: Callable[[], AbstractContextManager[Beginning]]


class Training(Protocol):
    """A run on its devices."""

    @property
    def writes(self) -> bool:
        """Whether this process writes journals and reports; among several, one does."""
        ...

    @property
    def devices(self) -> int:
        """How many devices it runs on."""
        ...

    def events(self, stop: Callable[[], Reason | None]) -> Iterator[Event]:
        """Run to the end, and yield what happens.

        Args:
          stop: returns why this process is to stop after the step, or None.

        Raises:
          InputError: processes differ, or a checkpoint cannot be read.
          MachineError: a checkpoint cannot be written.
        """
        ...


@runtime_checkable
class Trainer(Protocol):
    """A backend that trains."""

    def train(self, job: TrainJob) -> AbstractContextManager[Training]:
        """Bring a run onto the devices, and make its folder.

        Raises:
          UsageError, InputError: the mesh does not suit the model or the devices.
          MachineError: an extra is missing, or processes do not meet.
        """
        ...
