"""The checkpoints of a run: written while training goes on, and read where it begins."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import jax

from moecc.errors import MachineError, MoeccError
from moecc.formats.run import (
    PARAMS,
    StateReader,
    array_key,
    best_step,
    check_inside,
    require_state,
    saved_steps,
)
from moecc.ir.graph import Graph
from moecc.support.extras import install_hint
from moecc.train.events import (
    RunStore,
    Saved,
)
from moecc.train.run import (
    Position,
    begin_step,
    finish_step,
    keep_steps,
    write_part,
)
from moecc.types import DTYPES
from moecc_backends.xla.program import (
    is_first,
    meet_processes,
)
from moecc_backends.xla.trace.values import PyTree
from moecc_backends.xla.train.tensors import (
    StateLeaf,
    Tensors,
    restore,
    slots_of,
    to_tensors,
)

_SYSTEM = re.compile(r"([^:]+) \[os_error_code=")
"""The system's own words at the end of what tensorstore says."""

_LONGEST_SAVE_SECONDS = 24 * 3600
"""How long a save waits for other processes, which the watchdog ends before."""

_PIECE_BYTES = 32 << 20
"""Pieces of about this size are encoded and written at the same time, two of them."""


class Saver:
    """Writes checkpoints of a run, one at a time; on accelerators while training goes on.

    On CPUs training waits: what writes is what computes, and a copy of the state beside all that a
    step needs would be the most memory that the process ever has.

    Args:
      run: the folder of the run.
      keep: how many steps are kept, besides the best.
      beside: whether `save` returns before all is written; None: on accelerators.
      store: receives each step; its processes share no folder.

    Raises:
      MachineError: Orbax is missing.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        beside: bool | None = None,
        store: RunStore | None = None,
    ) -> None:
        try:
            import orbax.checkpoint as orbax
        except ImportError:
            raise MachineError(
                "saving a run needs orbax-checkpoint", hint=install_hint("train")
            ) from None
        # What fails is raised, and reported once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._arguments = orbax.args.PyTreeSave
        self._run, self._keep, self._store = run, keep, store
        self._processes, self._saves = jax.process_count(), count()
        self._shares_folder = store is None or self._processes == 1
        self._beside = jax.default_backend() != "cpu" if beside is None else beside
        self._checkpointer: PyTree = None
        self._writer = ThreadPoolExecutor(1)
        self._pending: tuple[Path, Future[Saved]] | None = None

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> list[Saved]:
        """Begin to write a step, once an earlier one is complete; return the completed steps.

        Args:
          step: steps done.
          tensors: the state; they may be deleted when this returns.
          facts: what ``step.json`` says.

        Raises:
          MachineError: the disk is full, or cannot be written, this time or the last.
        """
        done = self.wait()
        started = time.monotonic()
        if is_first() or not self._shares_folder:
            begin_step(self._run, step)
        meet_processes(f"moecc begins step {step}")
        folder = self._run / "steps" / str(step)
        if self._checkpointer is None:
            self._checkpointer = _checkpointer(tensors, self._shares_folder)
        try:
            state = (folder / "state").absolute()
            self._checkpointer.save(state, args=self._arguments(tensors))
        except Exception as error:
            raise _failed(error, folder / "state") from None
        future = self._writer.submit(self._complete, step, folder, dict(facts), started)
        self._pending = folder, future
        return done if self._beside else [*done, *self.wait()]

    def finished(self) -> list[Saved]:
        """Return the step that was completed since, if any. Raises as `save`."""
        return self.wait() if self._pending and self._pending[1].done() else []

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written, and return the step that was. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        try:
            return [pending[1].result()]
        except Exception as error:
            raise _failed(error, pending[0]) from None

    def close(self) -> None:
        """Wait, and let Orbax go; what fails now was not asked for any more."""
        self._writer.shutdown()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _complete(self, step: int, folder: Path, facts: Mapping[str, Any], started: float) -> Saved:
        self._checkpointer.wait_until_finished()
        if self._processes > 1:
            self._report_parts(step)
        is_best = False
        if is_first():
            folder = finish_step(self._run, step, facts).folder
            best = best_step(saved_steps(self._run))
            keep_steps(self._run, self._keep)
            if self._store is not None:
                self._store.put_run()
            is_best = best is not None and best.number == step
        return Saved(step, folder, is_best, time.monotonic() - started)

    def _report_parts(self, step: int) -> None:
        """Let each process hash what it wrote, and upload it where they share no folder."""
        from orbax.checkpoint import multihost

        process = jax.process_index()
        if process:
            write_part(self._run, step, process)
            if self._store is not None:
                self._store.put_part(step)
        # A barrier of the coordinator: a collective would meet those of the steps that go on.
        multihost.sync_global_processes(
            f"moecc wrote step {step}, save {next(self._saves)}",
            timeout=_LONGEST_SAVE_SECONDS,
            processes=set(range(self._processes)),
        )
        if self._store is not None and not process:
            self._store.get_parts(step, self._processes)


def _checkpointer(tensors: Tensors, shares_folder: bool) -> PyTree:
    """Return what writes arrays like `tensors`, a bounded number of bytes at a time.

    Without a bound Orbax encodes all of them at once, which is another copy of the state.
    Processes that share no folder write a file a chunk: those of all together are the arrays, where
    databases of each would have to be merged by one process that has all.
    """
    import orbax.checkpoint as orbax

    pieces = (
        prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in tensors.values()
    )
    # Without a primary process, each makes its folder and says in it what arrays there are.
    first = 0 if shares_folder else None
    processes = orbax.options.MultiprocessingOptions(primary_host=first)
    handler = orbax.BasePyTreeCheckpointHandler(
        save_concurrent_bytes=2 * max(_PIECE_BYTES, *pieces) + 1,
        use_ocdbt=shares_folder,
        use_zarr3=True,
        multiprocessing_options=processes,
    )
    tree_handler = orbax.PyTreeCheckpointHandler(
        use_ocdbt=shares_folder,
        use_zarr3=True,
        handler_impl=handler,
        multiprocessing_options=processes,
    )
    return orbax.AsyncCheckpointer(tree_handler, multiprocessing_options=processes)


def _failed(error: BaseException, folder: Path) -> MoeccError:
    if isinstance(error, MoeccError):
        return error
    text = " ".join(str(error).split())
    match = _SYSTEM.search(text)
    return MachineError(
        "a checkpoint cannot be written",
        where=str(folder),
        found=match[1] if match else text[:200],
        hint="free some space; moecc train --resume goes on from the last complete checkpoint",
    )


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
      store: has the steps, where processes share no folder; else None.
    """

    run: Path
    graph: Graph
    abstract: Callable[[int], PyTree]
    start: Callable[[], tuple[PyTree, Position]]
    saver: Saver
    recipe: str
    store: RunStore | None = None

    _last: tuple[PyTree, Callable[[PyTree], Tensors]] | None = field(init=False, default=None)

    def _slots(self, step: int) -> list[StateLeaf]:
        return slots_of(self.graph, self.abstract(step))

    def _tensors(self, state: PyTree, step: int) -> Tensors:
        kind = jax.tree.structure(state)
        if self._last is None or self._last[0] != kind:
            self._last = (kind, to_tensors(self._slots(step)))
        return self._last[1](state)

    def begin(self) -> tuple[PyTree, Position, float | None]:
        """Return state, position and best held-out loss of the last checkpoint, or the start.

        Raises:
          InputError: the checkpoint is not as it was saved, or not of this model.
        """
        if self.store is not None:
            meet_processes("moecc uploaded the last step")
            self.store.fetch()
        steps = saved_steps(self.run)
        if not steps:
            return (*self.start(), None)
        last, best = steps[-1], best_step(steps)
        check_inside(self.run, last)
        require_state(last)
        slots, abstract = self._slots(last.number), self.abstract(last.number)
        state = restore(slots, StateReader(last.state).read, abstract)
        at = Position(last.facts.step, last.facts.tokens, last.facts.left_out)
        return state, at, None if best is None else best.loss

    def save(self, state: PyTree, at: Position, loss: float | None) -> list[Saved]:
        """Begin to save; return the steps completed since. Raises MachineError."""
        done = self.wait()  # before tensors are made: of one save there is one copy
        tensors = self._tensors(state, at.step)
        prefix = array_key(PARAMS, "")
        names = {d.numpy: d.name for d in DTYPES.values() if d.kind != "key"}
        params = {
            key.removeprefix(prefix): {"dtype": names[array.dtype], "shape": list(array.shape)}
            for key, array in sorted(tensors.items())
            if key.startswith(prefix)
        }
        facts = {
            "recipe": self.recipe, "tokens": at.tokens, "left_out": list(at.left_out),
            "loss": loss, "tensors": params,
        }  # fmt: skip
        return [*done, *self.saver.save(at.step, tensors, facts)]

    def finished(self) -> list[Saved]:
        """Return the steps completed since. Raises MachineError."""
        return self.saver.finished()

    def wait(self) -> list[Saved]:
        """Wait until nothing is being saved; return the steps completed. Raises MachineError."""
        return self.saver.wait()
