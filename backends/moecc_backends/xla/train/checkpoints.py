"""The checkpoints of a run: saved under the names of the model, begun from whatever is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from moecc.checkpoint.run.digests import require_state
from moecc.checkpoint.run.layout import PARAMS, best_step, check_inside, saved_steps
from moecc.checkpoint.run.state import StateReader, array_key
from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.train.events import Saved
from moecc.train.position import Position
from moecc.types.dtypes import DTYPES
from moecc_backends.xla.trace.typed_jax import PyTree
from moecc_backends.xla.train.saving import Saver
from moecc_backends.xla.train.tensors import Slot, Tensors, restore, slots_of, to_tensors


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

    def _slots(self, step: int) -> list[Slot]:
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


def position_of(facts: Mapping[str, Any]) -> Position:
    """Return the position that a ``step.json`` states.

    Raises:
      InputError: it states none.
    """
    step, tokens, gone = facts.get("step"), facts.get("tokens"), facts.get("left_out")
    if not isinstance(step, int) or not isinstance(tokens, int) or not isinstance(gone, list):
        raise InputError("step.json does not say where the run was", where=f"step {step}")
    return Position(step, tokens, tuple(gone))


def _listed(tensors: Tensors) -> dict[str, dict[str, object]]:
    """Return types and shapes of the parameters, by their names."""
    prefix = array_key(PARAMS, "")
    names = {d.numpy: d.name for d in DTYPES.values() if d.kind != "key"}
    return {
        key.removeprefix(prefix): {"dtype": names[array.dtype], "shape": list(array.shape)}
        for key, array in sorted(tensors.items())
        if key.startswith(prefix)
    }
