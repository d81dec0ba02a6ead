"""The steps of a run whose groups of parameters are not all trained from the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp

from moecc.ir.graph import Graph
from moecc.steps.phases import Phase, phase_at, phases_of
from moecc.steps.spec import StepSpec
from moecc_backends.xla.trace.typed_jax import Devices, PyTree
from moecc_backends.xla.train.gradients import Arrays, Outputs
from moecc_backends.xla.train.step import State, TrainStep, make_train_step


@dataclass(frozen=True)
class PhasedStep:
    """A step of training for each phase of a run; a state knows by its moments which one it is of.

    Attributes:
      phases: in order, one at least.
      steps: the step of each; they differ in what is trained.
    """

    phases: Sequence[Phase]
    steps: Sequence[TrainStep]

    def at(self, done: int) -> TrainStep:
        """Return the step that follows after so many."""
        return self.steps[phase_at(self.phases, done)]

    def step(
        self, state: State, batch: Arrays, key: jax.Array, rate: jax.Array | float
    ) -> tuple[State, Outputs]:
        """Return the state after a step, and metrics; see `TrainStep.step`."""
        return self._by_structure[jax.tree.structure(state)].step(state, batch, key, rate)

    def entered(self, state: State, done: int) -> State:
        """Return a state as it is after so many steps: with zeros for moments that are new."""
        program = self.at(done)
        if self._by_structure[jax.tree.structure(state)] is program:
            return state
        wanted, known = _by_path(program.abstract_state), _by_path(state)
        new = {path: kind for path, kind in wanted.items() if path not in known}
        shardings = {path: kind.sharding for path, kind in new.items()}
        zeros = jax.jit(
            lambda: {path: jnp.zeros(kind.shape, kind.dtype) for path, kind in new.items()},
            out_shardings=shardings,
        )()
        leaves = [known[path] if path in known else zeros[path] for path in wanted]
        made: State = jax.tree.unflatten(jax.tree.structure(program.abstract_state), leaves)
        return made

    def model_params(self, state: State) -> dict[str, jax.Array]:
        """Return all parameters of the graph; see `TrainStep.model_params`."""
        return self.steps[0].model_params(state)

    def evaluate(self, params: Arrays, batch: Arrays) -> Outputs:
        """Return the metrics of a batch in evaluation; see `TrainStep.evaluate`."""
        return self.steps[0].evaluate(params, batch)

    @cached_property
    def _by_structure(self) -> dict[PyTree, TrainStep]:
        return {jax.tree.structure(step.abstract_state): step for step in self.steps}


def _by_path(state: State) -> dict[str, PyTree]:
    """Return the leaves of a state by their paths, in order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def make_phased_step(
    graph: Graph, spec: StepSpec, devices: Devices, evaluation: Graph | None = None
) -> PhasedStep:
    """Return the steps of `graph`, one for each phase; see `make_train_step`.

    Raises:
      InputError: as `make_train_step`.
    """
    assert spec.optimizer is not None, "a step of training has an optimiser"
    phases = phases_of(spec.optimizer)
    first = make_train_step(graph, replace(spec, optimizer=phases[0].section), devices, evaluation)
    later = (replace(first, spec=replace(spec, optimizer=p.section)) for p in phases[1:])
    return PhasedStep(phases, (first, *later))
