"""The training step of a graph: gradients, guard, update; as one program over all devices.

What is trained and its moments are of the type of the master weights; the model computes in the
type that is asked for, its router in float32 (selective precision, ST-MoE §3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from moecc.analysis import check_trainable
from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.train.recipe import GuardSection, OptimizerSection
from moecc.train.settings import (
    ParamSettings,
    Phase,
    StepSpec,
    bias_counts,
    moved,
    parameter_settings,
    phase_at,
    phases_of,
)
from moecc.types import KEY, TensorType
from moecc_backends.xla.trace.values import PyTree
from moecc_backends.xla.train.evaluation import (
    EvaluationStep,
    abstract_arrays,
    batch_loss,
    make_evaluation,
    sum_types,
    told,
    totals_for,
)
from moecc_backends.xla.train.gradients import (
    Arrays,
    BatchLoss,
    Outputs,
    StepShardings,
    batch_types,
    input_types,
    step_shardings,
)
from moecc_backends.xla.train.optimizer import Optimizer, Settle

# The guard of a step: what is not finite, or a spike of the loss, is not learned from.
#
# It is part of the compiled program, so that a bad step costs nothing but its time. When to go back
# to a checkpoint is the loop's to decide.

GuardState = dict[str, Array]
"""``losses``: those of the last steps that were taken; ``taken``, ``skipped``, ``in_a_row``."""


@dataclass(frozen=True)
class Guard:
    """Decides whether a step is taken.

    Attributes:
      section: how far a loss may be above the mean of how many before it.
    """

    section: GuardSection

    def init(self) -> GuardState:
        """Return the state before the first step."""
        zero = jnp.zeros((), jnp.int32)
        losses = jnp.zeros((self.section.window,), jnp.float32)
        return {"losses": losses, "taken": zero, "skipped": zero, "in_a_row": zero}

    def __call__(
        self, state: GuardState, loss: Array, norm: Array
    ) -> tuple[Array, GuardState, dict[str, Array]]:
        """Return whether the step is taken, the state after it, and metrics.

        ``guard.limit`` is the largest loss that is taken, infinite until the window is full.

        Args:
          state: the state before it.
          loss: of the batch.
          norm: of its gradients.
        """
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        limit = self._limit(state)
        is_spike = loss.astype(jnp.float32) > limit
        ok = is_finite & ~is_spike
        at = state["taken"] % self.section.window
        losses = state["losses"].at[at].set(loss.astype(jnp.float32))
        after = {
            "losses": jnp.where(ok, losses, state["losses"]),
            "taken": state["taken"] + ok,
            "skipped": state["skipped"] + ~ok,
            "in_a_row": jnp.where(ok, 0, state["in_a_row"] + 1),
        }
        told = {
            "guard.skipped": ~ok,
            "guard.spike": is_spike,
            "guard.limit": limit,
            "guard.in_a_row": after["in_a_row"],
        }
        return ok, after, told

    def _limit(self, state: GuardState) -> Array:
        """Return the loss above which a loss is far above those of the window."""
        unbounded = jnp.asarray(jnp.inf, jnp.float32)
        if not self.section.sigma:
            return unbounded
        losses = state["losses"]
        mean = jnp.mean(losses)
        # A deviation of nothing but rounding would make a spike of any loss.
        std = jnp.maximum(jnp.std(losses), 1e-4 * jnp.abs(mean))
        is_full = state["taken"] >= self.section.window
        return jnp.where(is_full, mean + self.section.sigma * std, unbounded)


State = dict[str, PyTree]
"""``params`` and ``bias`` by name, ``moments`` by kind and name, ``guard``, ``step``."""


def _as_changed(after: PyTree, before: PyTree) -> PyTree:
    return after


@dataclass(frozen=True)
class TrainStep:
    """A compiled step of training, and where its state lies.

    Attributes:
      graph: of a micro-batch.
      spec: what decides the step besides.
      where: how and where it is lowered.
      evaluation: of the same parameters, if there is one.
    """

    graph: Graph
    spec: StepSpec
    where: StepShardings
    evaluation: EvaluationStep | None = None

    # --- what there is

    @cached_property
    def section(self) -> OptimizerSection:
        """The optimiser's part of the recipe."""
        assert self.spec.optimizer is not None, "a step of training has an optimiser"
        return self.spec.optimizer

    @cached_property
    def settings(self) -> dict[str, ParamSettings]:
        """How each parameter is trained, by its name in the graph; biases of balance are not."""
        settings = parameter_settings(self.graph, self.section)
        return {n: s for n, s in settings.items() if n not in self.biases}

    @cached_property
    def biases(self) -> dict[str, tuple[str, ...]]:
        """The outputs that count choices, one for each layer, by the name of a balance bias."""
        return bias_counts(self.graph)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The parameters that have a gradient."""
        return tuple(n for n, s in self.settings.items() if s.trained)

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimiser, of what is trained."""
        types = {n: self.graph.params[n].type for n in self.trained}
        return Optimizer(self.section, types, {n: self.settings[n] for n in self.trained})

    @cached_property
    def guard(self) -> Guard | None:
        """The guard, if there is one."""
        return None if self.spec.guard is None else Guard(self.spec.guard)

    @cached_property
    def loss(self) -> BatchLoss:
        """The loss of a batch on one device."""
        return batch_loss(self.graph, self.spec, self.where)

    # --- the state

    def init(self, params: Mapping[str, PyTree]) -> State:
        """Return the state before the first step, where it belongs.

        Args:
          params: by the names of the graph; those of this process's devices, or whole.

        Raises:
          InputError: a parameter is missing.
        """
        kinds = {**self.abstract_state["params"], **self.abstract_state["bias"]}
        missing = [n for n in kinds if n not in params]
        if missing:
            raise InputError("a parameter is missing", expected=", ".join(missing[:5]))
        placed = {
            n: jax.device_put(jnp.asarray(params[n], kind.dtype), kind.sharding)
            for n, kind in kinds.items()
        }
        out = jax.tree.map(lambda a: a.sharding, self.abstract_state)
        return jax.jit(self._initial, out_shardings=out)(placed)

    def _initial(self, params: Arrays) -> State:
        trained = {n: params[n] for n in self.trained}
        return {
            "params": {n: params[n] for n in self.settings},
            "moments": self.optimizer.init(trained),
            "bias": {n: params[n] for n in self.biases},
            "guard": {} if self.guard is None else self.guard.init(),
            "step": jnp.zeros((), jnp.int32),
        }

    @cached_property
    def abstract_state(self) -> State:
        """The shapes, types and shardings of the state."""
        params = {n: self._abstract_param(n) for n in self.settings}
        bias = {n: self._abstract_param(n) for n in self.biases}
        shapes = jax.eval_shape(self._initial, {**params, **bias})
        replicated = self.where.whole
        state: State = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), shapes
        )
        state |= {"params": params, "bias": bias}
        for kind, types in self.optimizer.moment_types.items():
            state["moments"][kind] = {n: self._abstract_moment(n, t) for n, t in types.items()}
        return state

    def _abstract_param(self, name: str) -> jax.ShapeDtypeStruct:
        value = self.graph.params[name]
        kind = self.spec.config.weight_type.numpy
        return jax.ShapeDtypeStruct(value.type.shape, kind, sharding=self.where.param(value))

    def _abstract_moment(self, name: str, type: TensorType) -> jax.ShapeDtypeStruct:
        """Return a moment, sharded along the axes that it has of its parameter."""
        type_of_param, param = self.graph.params[name].type, self._abstract_param(name)
        sharding = param.sharding
        if isinstance(sharding, NamedSharding):
            parts = dict(
                zip(
                    type_of_param.names,
                    [*sharding.spec, *[None] * type_of_param.rank],
                    strict=False,
                )
            )
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*map(parts.get, type.names)))
        return jax.ShapeDtypeStruct(type.shape, param.dtype, sharding=sharding)

    @cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes, types and shardings of a batch: the graph's inputs, and the targets."""
        return abstract_arrays(batch_types(self.graph), self.spec, self.where)

    @property
    def arguments(self) -> tuple[PyTree, ...]:
        """What `step` takes, abstractly."""
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=self.where.whole)
        rate = jax.ShapeDtypeStruct((), np.dtype("float32"), sharding=self.where.whole)
        return self.abstract_state, self.abstract_batch, key, rate

    # --- the step

    @cached_property
    def function(self) -> PyTree:
        """The jitted step ``(state, batch, key, rate) → (state, metrics)``; it takes the state."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state)
        return jax.jit(self.pure, donate_argnums=(0,), out_shardings=(shardings, None))

    def step(
        self, state: State, batch: Arrays, key: Array, rate: Array | float
    ) -> tuple[State, Outputs]:
        """Return the state after a step, and metrics; the state that is given is used up.

        Args:
          state: as `init` returns it.
          batch: the graph's inputs, but for a key, and the targets ``[batch, seq]``, −1 for none.
          key: of all that is random in this step.
          rate: the learning rate.
        """
        return self.function(state, batch, key, jnp.asarray(rate, jnp.float32))

    def check(self) -> None:
        """Trace the step and its evaluation, which they are not again for a batch.

        Raises:
          InputError: the mesh or micro-batches do not suit the batch.
        """
        state, batch = self.abstract_state, self.abstract_batch
        # As `step` is given them: a sharding would be another trace.
        key, rate = jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(0)))
        self.function.trace(state, batch, key, rate)
        if self.evaluation is not None:
            self.evaluation.check(self.model_params(state), batch, key)

    def evaluate(self, params: Arrays, batch: Arrays, key: Array | None = None) -> Outputs:
        """Return the metrics of a batch in evaluation; see `EvaluationStep.evaluate`."""
        assert self.evaluation is not None, "make_train_step was given the graph of evaluation"
        return self.evaluation.evaluate(params, batch, key)

    @staticmethod
    def model_params(state: State) -> dict[str, Array]:
        """Return all parameters of the graph: those that are trained, frozen, and biases."""
        return {**state["params"], **state["bias"]}

    def pure(self, state: State, batch: Arrays, key: Array, rate: Array) -> tuple[State, Outputs]:
        """Return what `step` returns, as a function to trace."""
        params = state["params"]
        trained = {n: params[n] for n in self.trained}
        fixed = {n: a for n, a in self.model_params(state).items() if n not in trained}
        slopes, sums = self.gradients(trained, fixed, batch, key)
        norm = gradient_norm(slopes)
        metrics = {**told(sums, self.graph), "gradient_norm": norm, "rate": rate}
        keep, guard = _as_changed, state["guard"]
        if self.guard is not None:
            ok, guard, more = self.guard(guard, metrics["loss"], norm)
            keep = partial(jax.tree.map, partial(jnp.where, ok))
            metrics |= more
        changed, moments = self.update(trained, state["moments"], slopes, norm, rate, keep)
        bias = {n: self._moved_bias(n, b, sums) for n, b in state["bias"].items()}
        after = {
            "params": {**params, **keep(changed, trained)}, "moments": moments,
            "bias": keep(bias, state["bias"]), "guard": guard, "step": state["step"] + 1,
        }  # fmt: skip
        return after, metrics

    def gradients(
        self, trained: Arrays, fixed: Arrays, batch: Arrays, key: Array
    ) -> tuple[dict[str, Array], Outputs]:
        """Return the gradients of what is trained, and sums over the batch; a function to trace."""
        graph = self.graph
        types = {n: graph.params[n].type for n in (*self.settings, *self.biases)}
        trained_types = {n: types[n] for n in trained}
        fixed_types = {n: types[n] for n in fixed}
        totals = totals_for(graph, self.spec, self.where, batch)
        arguments = (
            trained_types,
            fixed_types,
            {**batch_types(graph), **dict.fromkeys(totals)},
            None,
        )
        run = self.where.mapped(self.loss.gradients, arguments, (trained_types, sum_types(graph)))
        return run(trained, fixed, {**batch, **totals}, key)

    def update(
        self,
        trained: Arrays,
        moments: PyTree,
        slopes: Arrays,
        norm: Array,
        rate: Array,
        keep: Settle = _as_changed,
    ) -> tuple[dict[str, Array], PyTree]:
        """Return what parameters become, and the moments that `keep` keeps; to trace."""

        def settle(after: PyTree, before: PyTree) -> PyTree:
            # XLA for CPUs would compute the moments once more within the update of a parameter,
            # from those before, which it copies for that: with 30 M parameters a third more time
            # for this part of a step, and 608 MB of temporaries in place of 415.
            settled = keep(after, before)
            return (
                jax.tree.map(jax.lax.optimization_barrier, settled)
                if self.where.lowering.options.target == "cpu"
                else settled
            )

        clipped = self._clipped(slopes, norm)
        directions, after = self.optimizer.directions(clipped, moments, trained, settle)
        return {n: self._moved(n, trained[n], d, rate) for n, d in directions.items()}, after

    def _clipped(self, slopes: Arrays, norm: Array) -> Arrays:
        if not self.section.clip:
            return slopes
        factor = self.section.clip / jnp.maximum(norm, self.section.clip)
        return {n: g * factor.astype(g.dtype) for n, g in slopes.items()}

    def _moved_bias(self, name: str, bias: Array, sums: Outputs) -> Array:
        """Return a balance bias after a step, by the choices of the whole batch."""
        if not self.spec.bias_rate:
            return bias
        counts = jnp.stack([sums[output] for output in self.biases[name]])
        return moved(bias, counts.reshape(bias.shape), self.spec.bias_rate).astype(bias.dtype)

    def _moved(self, name: str, param: Array, direction: Array, rate: Array) -> Array:
        settings = self.settings[name]
        if settings.decay:
            direction = direction + settings.decay * param
        return param - (rate * settings.rate).astype(param.dtype) * direction.astype(param.dtype)


def gradient_norm(slopes: Arrays) -> Array:
    """Return the norm of all gradients together, in float32 at least."""
    squares = [
        jnp.sum(jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32))))
        for g in slopes.values()
    ]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def make_train_step(
    graph: Graph, spec: StepSpec, devices: list[jax.Device], evaluation: Graph | None = None
) -> TrainStep:
    """Return the step of `graph` over `devices`, which its mesh has as many of.

    Args:
      graph: of a micro-batch, for training with its losses.
      spec: what decides the step besides.
      devices: in the order of the mesh.
      evaluation: the graph of a micro-batch in evaluation.

    Raises:
      InputError: the mesh or micro-batches cut a group of tokens, or the graph cannot be trained.
    """
    check_trainable(graph)
    judge = None if evaluation is None else make_evaluation(evaluation, spec, devices)
    return TrainStep(graph, spec, step_shardings(graph, spec, devices), judge)


# The steps of a run whose groups of parameters are not all trained from the beginning.


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
        self, state: State, batch: Arrays, key: Array, rate: Array | float
    ) -> tuple[State, Outputs]:
        """Return the state after a step, and metrics; see `TrainStep.step`."""
        return self._by_structure[jax.tree.structure(state)].step(state, batch, key, rate)

    def entered(self, state: State, done: int) -> State:
        """Return a state as it is after so many steps: with zeros for moments that are new."""
        program = self.at(done)
        if self._by_structure[jax.tree.structure(state)] is program:
            return state
        wanted, present = _by_path(program.abstract_state), _by_path(state)
        new = {path: kind for path, kind in wanted.items() if path not in present}
        shardings = {path: kind.sharding for path, kind in new.items()}
        zeros = jax.jit(
            lambda: {path: jnp.zeros(kind.shape, kind.dtype) for path, kind in new.items()},
            out_shardings=shardings,
        )()
        leaves = [present[path] if path in present else zeros[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(program.abstract_state), leaves)

    def model_params(self, state: State) -> dict[str, Array]:
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
    graph: Graph, spec: StepSpec, devices: list[jax.Device], evaluation: Graph | None = None
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


_SHARED: dict[str, PhasedStep] = {}
"""The last step: runs of a sweep that differ in rates, schedules or seeds share it."""


def shared_step(
    graph: Graph, spec: StepSpec, devices: list[jax.Device], evaluation: Graph
) -> PhasedStep:
    """Return `make_phased_step`, or the last one that was made if it is the same program.

    The rate is an argument of a program, so that what decides it is no part of the comparison.
    """
    assert spec.optimizer is not None, "a step of training has an optimiser"
    unset = OptimizerSection()
    section = replace(
        spec.optimizer, rate=unset.rate, schedule=unset.schedule, warmup=unset.warmup,
        decay_steps=unset.decay_steps, end_factor=unset.end_factor,
    )  # fmt: skip
    spec = replace(spec, optimizer=section)
    key = "\n".join((print_graph(graph), print_graph(evaluation), repr(spec), repr(devices)))
    if key not in _SHARED:
        _SHARED.clear()
        _SHARED[key] = make_phased_step(graph, spec, devices, evaluation)
    return _SHARED[key]


# The training step or the forward pass of a graph on a mesh, ready to be compiled or run.
#
# No weights are needed: parameters, state and inputs are shapes, types and shardings. The step that
# is compiled ahead of time is the step that runs.


@dataclass(frozen=True)
class AbstractStep:
    """A jitted function and what it takes, abstractly."""

    function: PyTree
    arguments: tuple[PyTree, ...]


def make_step(graph: Graph, spec: StepSpec, devices: list[jax.Device]) -> AbstractStep:
    """Return the step of `graph` over `devices`, which the mesh has as many of.

    Args:
      graph: the graph, for training with its losses.
      spec: how it is trained or run.
      devices: in the order of the mesh.

    Raises:
      InputError: the mesh cuts a group of tokens, or the graph cannot be trained.
    """
    if spec.optimizer is not None:
        step = make_train_step(graph, spec, devices)
        return AbstractStep(step.function, step.arguments)
    where = step_shardings(graph, spec, devices)
    params = {
        name: jax.ShapeDtypeStruct(
            value.type.shape, spec.config.weight_type.numpy, sharding=where.param(value)
        )
        for name, value in graph.params.items()
        if value.users
    }
    inputs = abstract_arrays(input_types(graph), spec, where)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=where.whole)
    inputs |= {n: key for n, v in graph.inputs.items() if v.type.dtype == KEY}
    return AbstractStep(jax.jit(where.model(graph)), (params, inputs))
