"""The training loop, as a stream of events.

Nothing here prints, and nothing but checkpoints is written: whoever reads the events does that.  An
event is handled before the loop goes on, so a checkpoint is never ahead of the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import jax
import numpy as np

from moecc.train.events import (
    Evaluated,
    Event,
    GuardFault,
    Metric,
    Reason,
    Saved,
    Skipped,
    Stepped,
    Stopped,
    guard_faults,
)
from moecc.train.position import Position, batch_of
from moecc.train.recipe import RunSection
from moecc.types.arrays import Array
from moecc_backends.xla.run.device_memory import within_memory
from moecc_backends.xla.trace.typed_jax import PyTree
from moecc_backends.xla.train.gradients import LOSS_SUM, TOKENS

State = PyTree
Placed = Mapping[str, jax.Array]
"""A batch on its devices."""

SKIPPED = "guard.skipped"
LIMIT = "guard.limit"
"""The metric of a step that says whether its update was left out."""


class Program(Protocol):
    """The compiled functions of a recipe."""

    def step(
        self, state: State, batch: Placed, key: jax.Array, rate: float
    ) -> tuple[State, Mapping[str, jax.Array]]:
        """Return state and metrics after one step; the state that is given is donated."""
        ...

    def entered(self, state: State, done: int) -> State:
        """Return a state as the step after so many takes it: more may be trained from there on."""
        ...

    def model_params(self, state: State) -> Mapping[str, jax.Array]:
        """Return the parameters of the model in a state."""
        ...

    def evaluate(self, params: Mapping[str, jax.Array], batch: Placed) -> Mapping[str, jax.Array]:
        """Return `LOSS_SUM` and `TOKENS` of a batch."""
        ...


class Feed(Protocol):
    """The batches of a recipe, on their devices."""

    @property
    def held_out(self) -> Mapping[str, int]:
        """The number of batches of each held-out text."""
        ...

    def train(self, number: int) -> Placed:
        """Return a batch of the mixture."""
        ...

    def evaluate(self, name: str, number: int) -> Placed:
        """Return a batch of a held-out text."""
        ...


class Checkpoints(Protocol):
    """Saves the state of a run, and begins from what was saved."""

    def begin(self) -> tuple[State, Position, float | None]:
        """Return state, position and best held-out loss of the last checkpoint, or the start."""
        ...

    def save(self, state: State, at: Position, loss: float | None) -> list[Saved]:
        """Begin to save, and return what is complete since."""
        ...

    def finished(self) -> list[Saved]:
        """Return what is complete since."""
        ...

    def wait(self) -> list[Saved]:
        """Wait until nothing is being saved, and return what is complete since."""
        ...


@dataclass
class Loop:
    """A run from its last checkpoint to its end.

    Attributes:
      program: the step.
      feed: its batches.
      checkpoints: where it begins, and where it is saved.
      run: how long, and how often what happens.
      rate: the learning rate of a step, by its number from 0.
      stop: returns why to stop after this step, or None; equal in all processes.
      clock: returns seconds, equal in all processes.
      spread: returns how far experts are apart, from the parameters; None without experts.
    """

    program: Program
    feed: Feed
    checkpoints: Checkpoints
    run: RunSection
    rate: Callable[[int], float]
    stop: Callable[[], Reason | None]
    clock: Callable[[], float] = time.monotonic
    spread: Callable[[Mapping[str, jax.Array]], dict[str, list[float]]] | None = None

    _state: State = field(init=False, default=None)
    _at: Position = field(init=False, default=Position())
    _best: float | None = field(init=False, default=None)
    _saved: Position = field(init=False, default=Position())
    _faults: tuple[GuardFault, ...] = field(init=False, default=())
    _saved_seconds: float = field(init=False, default=0.0)

    def events(self) -> Iterator[Event]:
        """Run, and yield what happens.

        Raises:
          MachineError: a checkpoint cannot be written, or the memory of a device is too small.
          InputError: the last checkpoint cannot be read.
        """
        with within_memory():
            yield from self._events()

    def _events(self) -> Iterator[Event]:
        self._begin()
        returned_to: int | None = None
        while (streak := (yield from self._until_streak())) is not None:
            yield from self.checkpoints.wait()
            self._begin()
            if returned_to == self._at.step:
                yield Stopped(self._at.step, Reason.GUARD, self._faults)
                return
            returned_to = self._at.step
            self._at = self._at.without(streak)
            yield Skipped(self._at.step, {}, streak[-1], returned_to, streak)

    def _begin(self) -> None:
        self._state = None  # before another one is made
        self._state, self._at, self._best = self.checkpoints.begin()
        self._saved, self._saved_seconds = self._at, self.clock()

    def _until_streak(self) -> Generator[Event, None, tuple[int, ...] | None]:
        """Run to the end, or until too many steps in a row were skipped: then their batches."""
        streak: list[int] = []
        batch = self.feed.train(self._at.batch) if self._at.step < self.run.steps else {}
        while self._at.step < self.run.steps:
            number, started = self._at.batch, time.monotonic()
            metrics = self._dispatch(batch)
            if self._at.step + 1 < self.run.steps:
                # While the devices compute.
                batch = self.feed.train(batch_of(self._at.step + 1, self._at.left_out))
            found = on_host(metrics)
            skipped, tokens = bool(found.pop(SKIPPED, 0)), int(scalar(found.pop(TOKENS)))
            limit = scalar(found.pop(LIMIT, inf))
            self._at = self._at.after(0 if skipped else tokens)
            self._state = self.program.entered(self._state, self._at.step)
            if skipped:
                streak.append(number)
                self._faults = guard_faults(found, limit)
                yield Skipped(self._at.step, found, number, faults=self._faults)
                if len(streak) >= self.run.guard.skips > 0:
                    return tuple(streak)
            else:
                streak.clear()
                seconds = time.monotonic() - started
                yield Stepped(self._at.step, found, self._at.tokens, seconds)
            if (yield from self._between(bool(streak))):
                return None
        yield from self.checkpoints.wait()
        yield Stopped(self._at.step, Reason.DONE)
        return None

    def _dispatch(self, batch: Placed) -> Mapping[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(self.run.seed), self._at.batch)
        self._state, metrics = self.program.step(self._state, batch, key, self.rate(self._at.step))
        return metrics

    def _between(self, is_skipped: bool) -> Generator[Event, None, bool]:
        """Evaluate, save and stop where it is time to; return whether the run stops."""
        step, is_last = self._at.step, self._at.step == self.run.steps
        why = self.stop()
        loss: float | None = None
        if self.feed.held_out and (is_last or is_due(step, self.run.evaluate_steps)):
            evaluated = self._evaluate()
            yield evaluated
            loss = evaluated.mean
        is_best = loss is not None and (self._best is None or loss < self._best)
        # Between skipped steps a checkpoint would be one to which a return is of no use.
        if is_last or why is not None or (not is_skipped and (is_best or self._is_time(step))):
            self._best = loss if is_best else self._best
            yield from self._save(loss)
        yield from self.checkpoints.finished()
        if why is None or is_last:
            return False
        yield from self.checkpoints.wait()
        yield Stopped(step, why)
        return True

    def _is_time(self, step: int) -> bool:
        minutes = self.run.save_minutes
        elapsed_seconds = self.clock() - self._saved_seconds
        is_step = is_due(step, self.run.save_steps) or is_due(step, self.run.export_steps)
        return is_step or 0 < minutes * 60 <= elapsed_seconds

    def _save(self, loss: float | None) -> Iterator[Saved]:
        if self._saved == self._at and loss is None:
            return
        yield from self.checkpoints.save(self._state, self._at, loss)
        self._saved, self._saved_seconds = self._at, self.clock()

    def _evaluate(self) -> Evaluated:
        losses, params = {}, self.program.model_params(self._state)
        for name, batches in self.feed.held_out.items():
            sums = [
                self.program.evaluate(params, self.feed.evaluate(name, number))
                for number in range(batches)
            ]
            total = sum(float(s[LOSS_SUM]) for s in sums)
            losses[name] = total / max(sum(float(s[TOKENS]) for s in sums), 1.0)
        return Evaluated(self._at.step, losses, self.spread(params) if self.spread else {})


def is_due(step: int, every: int) -> bool:
    """Return whether something that is done every so many steps is due; never for 0."""
    return every > 0 and step % every == 0


def on_host(metrics: Mapping[str, jax.Array]) -> dict[str, Metric]:
    """Return metrics as numbers, and lists of them."""
    found = jax.device_get(dict(metrics))
    return {name: _plain(np.asarray(value)) for name, value in sorted(found.items())}


def _plain(value: Array) -> Metric:
    return [float(x) for x in value.reshape(-1)] if value.ndim else float(value)


def scalar(metric: Metric) -> float:
    """Return a metric that is one number."""
    assert not isinstance(metric, list), "it is one number"
    return metric
