"""Checkpoints by Orbax: asynchronous, and complete or absent.

Orbax writes the arrays, each process the shards of its devices, into ``steps/N/state``; then the
first process writes ``steps/N/step.json``, which makes the step one of the run's.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import jax

from moecc.errors import MachineError, MoeccError
from moecc.formats.run import (
    PARAMS,
    StateReader,
    StepRecord,
    array_key,
    best_step,
    check_inside,
    require_state,
    saved_steps,
)
from moecc.ir.graph import Graph
from moecc.support.extras import install_hint
from moecc.train.events import Saved
from moecc.train.run import Position, begin_step, finish_step, keep_steps
from moecc.types import DTYPES
from moecc_backends.xla.run.processes import is_first, meet_processes
from moecc_backends.xla.trace.typed_jax import PyTree
from moecc_backends.xla.train.tensors import StateLeaf, Tensors, restore, slots_of, to_tensors

_SYSTEM = re.compile(r"([^:]+) \[os_error_code=")
"""The system's own words at the end of what tensorstore says."""

_PIECE_BYTES = 32 << 20
"""Pieces of about this size are encoded and written at the same time, two of them."""


@dataclass
class _Pending:
    """A save that is being written."""

    step: int
    started_seconds: float
    thread: threading.Thread = field(init=False)
    saved: Saved | None = None
    error: BaseException | None = None


class Saver:
    """Writes checkpoints of a run, one at a time; on accelerators while training goes on.

    On CPUs training waits: what writes is what computes, and a copy of the state beside all that a
    step needs would be the most memory that the process ever has.

    Args:
      run: the folder of the run.
      keep: how many steps are kept, besides the best.
      beside: whether `save` returns before all is written; None: on accelerators.

    Raises:
      MachineError: Orbax is missing.
    """

    def __init__(self, run: Path, keep: int, beside: bool | None = None) -> None:
        try:
            import orbax.checkpoint as orbax
        except ImportError:
            raise MachineError(
                "saving a run needs orbax-checkpoint", hint=install_hint("train")
            ) from None
        # What fails is raised, and reported once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._arguments = orbax.args.PyTreeSave
        self._run, self._keep = run, keep
        self._beside = jax.default_backend() != "cpu" if beside is None else beside
        self._checkpointer: PyTree = None
        self._pending: _Pending | None = None

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> list[Saved]:
        """Begin to write a step, once an earlier one is complete; return what is complete.

        Args:
          step: steps done.
          tensors: the state; they may be deleted when this returns.
          facts: what ``step.json`` says.

        Raises:
          MachineError: the disk is full, or cannot be written, this time or the last.
        """
        done = self.wait()
        started = time.monotonic()
        if is_first():
            begin_step(self._run, step)
        meet_processes(f"moecc begins step {step}")
        folder = self._run / "steps" / str(step) / "state"
        if self._checkpointer is None:
            pieces = (
                prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
                for array in tensors.values()
            )
            self._checkpointer = _checkpointer(max(pieces, default=0))
        try:
            self._checkpointer.save(folder.absolute(), args=self._arguments(tensors))
        except Exception as error:
            raise _failed(error, folder) from None
        self._pending = pending = _Pending(step, started)
        pending.thread = threading.Thread(
            target=self._finish, args=(pending, dict(facts)), daemon=True
        )
        pending.thread.start()
        return done if self._beside else [*done, *self.wait()]

    def finished(self) -> list[Saved]:
        """Return the step that was completed since, if any. Raises as `save`."""
        pending = self._pending
        if pending is None or pending.thread.is_alive():
            return []
        return self.wait()

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written, and return the step that was. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        pending.thread.join()
        if pending.error is not None:
            raise _failed(pending.error, self._run / "steps" / str(pending.step))
        return [] if pending.saved is None else [pending.saved]

    def close(self) -> None:
        """Wait, and let Orbax go; what fails now was not asked for any more."""
        if self._pending is not None:
            self._pending.thread.join()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _finish(self, pending: _Pending, facts: Mapping[str, Any]) -> None:
        try:
            self._checkpointer.wait_until_finished()
            pending.saved = self._completed(pending.step, facts, pending.started_seconds)
        except BaseException as error:
            pending.error = error

    def _completed(self, step: int, facts: Mapping[str, Any], started: float) -> Saved:
        if not is_first():
            return Saved(step, self._run / "steps" / str(step), False, time.monotonic() - started)
        done = finish_step(self._run, step, facts)
        best = best_step(saved_steps(self._run))
        keep_steps(self._run, self._keep)
        is_best = best is not None and best.number == step
        return Saved(step, done.folder, is_best, time.monotonic() - started)


def _checkpointer(largest_bytes: int) -> PyTree:
    """Return what writes arrays, of which `largest_bytes` are the most in one piece.

    Without a bound Orbax encodes all of them at once, which is another copy of the state.
    """
    import orbax.checkpoint as orbax

    handler = orbax.BasePyTreeCheckpointHandler(
        save_concurrent_bytes=2 * max(largest_bytes, _PIECE_BYTES) + 1,
        use_ocdbt=True, use_zarr3=True,
    )  # fmt: skip
    return orbax.AsyncCheckpointer(
        orbax.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, handler_impl=handler)
    )


def _failed(error: BaseException, folder: Path) -> MoeccError:
    if isinstance(error, MoeccError):
        return error
    text = " ".join(str(error).split())
    match = _SYSTEM.search(text)
    return MachineError(
        "a checkpoint cannot be written", where=str(folder),
        found=match[1] if match else text[:200],
        hint="free some space; moecc train --resume goes on from the last complete checkpoint",
    )  # fmt: skip


# The checkpoints of a run: saved under the names of the model, begun from whatever is there.


@dataclass
class RunCheckpoints:
    """The checkpoints of one run.

    Attributes:
      run: the folder.
      graph: the program's; the weights of its parameters are over tensors of the state.
      abstract: the program's state after so many steps, as shapes, types and shardings.
      start: makes the state before the first step, where nothing is saved yet.
      saver: writes.
      recipe: the digest of the recipe.
    """

    run: Path
    graph: Graph
    abstract: Callable[[int], PyTree]
    start: Callable[[], tuple[PyTree, Position]]
    saver: Saver
    recipe: str

    _known: tuple[PyTree, Callable[[PyTree], Tensors]] | None = field(init=False, default=None)

    def _slots(self, step: int) -> list[StateLeaf]:
        return slots_of(self.graph, self.abstract(step))

    def _tensors(self, state: PyTree, step: int) -> Tensors:
        kind = jax.tree.structure(state)
        if self._known is None or self._known[0] != kind:
            self._known = (kind, to_tensors(self._slots(step)))
        return self._known[1](state)

    def begin(self) -> tuple[PyTree, Position, float | None]:
        """Return state, position and best held-out loss of the last checkpoint, or the start.

        Raises:
          InputError: the checkpoint is not as it was saved, or not of this model.
        """
        steps = saved_steps(self.run)
        if not steps:
            return (*self.start(), None)
        check_inside(self.run, steps[-1])
        require_state(steps[-1])
        step = steps[-1].number
        state = restore(self._slots(step), StateReader(steps[-1].state).read, self.abstract(step))
        best = best_step(steps)
        return state, position_of(steps[-1].facts), None if best is None else best.loss

    def save(self, state: PyTree, at: Position, loss: float | None) -> list[Saved]:
        """Begin to save; return what is complete since. Raises MachineError."""
        done = self.saver.wait()  # before tensors are made: of one save there is one copy
        tensors = self._tensors(state, at.step)
        facts = {
            "recipe": self.recipe, "tokens": at.tokens, "left_out": list(at.left_out),
            "loss": loss, "tensors": _listed(tensors),
        }  # fmt: skip
        return [*done, *self.saver.save(at.step, tensors, facts)]

    def finished(self) -> list[Saved]:
        """Return what is complete since. Raises MachineError."""
        return self.saver.finished()

    def wait(self) -> list[Saved]:
        """Wait until nothing is being saved; return what is complete since. Raises MachineError."""
        return self.saver.wait()


def position_of(facts: StepRecord) -> Position:
    """Return the position that a ``step.json`` states."""
    return Position(facts.step, facts.tokens, facts.left_out)


def _listed(tensors: Tensors) -> dict[str, dict[str, object]]:
    """Return types and shapes of the parameters, by their names."""
    prefix = array_key(PARAMS, "")
    names = {d.numpy: d.name for d in DTYPES.values() if d.kind != "key"}
    return {
        key.removeprefix(prefix): {"dtype": names[array.dtype], "shape": list(array.shape)}
        for key, array in sorted(tensors.items())
        if key.startswith(prefix)
    }
