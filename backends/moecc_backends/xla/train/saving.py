"""Checkpoints by Orbax: asynchronous, and complete or absent.

Orbax writes the arrays, each process the shards of its devices, into ``steps/N/state``; then the
first process writes ``steps/N/step.json``, which makes the step one of the run's.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from moecc.checkpoint.run.layout import best_step, saved_steps
from moecc.errors import MachineError, MoeccError
from moecc.support.extras import install_hint
from moecc.train.events import Saved
from moecc.train.run_folder import begin_step, finish_step, keep_steps
from moecc_backends.xla.train.tensors import Tensors

_SYSTEM = re.compile(r"([^:]+) \[os_error_code=")
"""The system's own words at the end of what tensorstore says."""


@dataclass
class _Pending:
    """A save that is being written."""

    step: int
    started_seconds: float
    thread: threading.Thread
    saved: Saved | None = None
    error: BaseException | None = None


class Saver:
    """Writes checkpoints of a run, one at a time, while training goes on.

    Args:
      run: the folder of the run.
      keep: how many steps are kept, besides the best.

    Raises:
      MachineError: Orbax is missing.
    """

    def __init__(self, run: Path, keep: int) -> None:
        try:
            import orbax.checkpoint as orbax
        except ImportError:
            raise MachineError(
                "saving a run needs orbax-checkpoint", hint=install_hint("train")
            ) from None
        # What fails is raised, and reported once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._arguments = orbax.args.PyTreeSave
        self._checkpointer = orbax.AsyncCheckpointer(
            orbax.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
        )
        self._run, self._keep = run, keep
        self._pending: _Pending | None = None

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> list[Saved]:
        """Begin to write a step, once an earlier one is complete; return that one.

        Args:
          step: steps done.
          tensors: the state, on the devices; they may be deleted when this returns.
          facts: what ``step.json`` says.

        Raises:
          MachineError: the disk is full, or cannot be written, this time or the last.
        """
        done = self.wait()
        first, started = jax.process_index() == 0, time.monotonic()
        if first:
            begin_step(self._run, step)
        _meet(f"moecc begins step {step}")
        folder = self._run / "steps" / str(step) / "state"
        try:
            self._checkpointer.save(folder.absolute(), args=self._arguments(tensors))
        except Exception as error:
            raise _failed(error, folder) from None
        thread = threading.Thread(target=self._finish, args=(step, dict(facts)), daemon=True)
        self._pending = _Pending(step, started, thread)
        thread.start()
        return done

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
        self._checkpointer.close()

    def _finish(self, step: int, facts: Mapping[str, Any]) -> None:
        pending = self._pending
        assert pending is not None, "a save is pending while it is finished"
        try:
            self._checkpointer.wait_until_finished()
            pending.saved = self._completed(step, facts, pending.started_seconds)
        except BaseException as error:
            pending.error = error

    def _completed(self, step: int, facts: Mapping[str, Any], started: float) -> Saved:
        if jax.process_index() != 0:
            return Saved(step, self._run / "steps" / str(step), False, time.monotonic() - started)
        done = finish_step(self._run, step, facts)
        best = best_step(saved_steps(self._run))
        keep_steps(self._run, self._keep)
        is_best = best is not None and best.number == step
        return Saved(step, done.folder, is_best, time.monotonic() - started)


def _meet(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _failed(error: BaseException, folder: Path) -> MoeccError:
    if isinstance(error, MoeccError):
        return error
    text = " ".join(str(error).split())
    found = _SYSTEM.search(text)
    return MachineError(
        "a checkpoint cannot be written", where=str(folder),
        found=found[1] if found else text[:200],
        hint="free some space; moecc train --resume goes on from the last complete checkpoint",
    )  # fmt: skip
