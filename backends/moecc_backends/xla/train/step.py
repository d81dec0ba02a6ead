"""The step of a graph: its evaluation over a batch, and its training as one program.

What is trained and its moments are of the type of the master weights; the model computes in the
type that is asked for, its router in float32 (selective precision, ST-MoE §3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from moecc.analysis import VOCAB, check_trainable
from moecc.errors import InputError
from moecc.ir.conventions import AUXILIARY, LOGITS
from moecc.ir.graph import Graph, Node
from moecc.ir.routing_losses import MASK
from moecc.ir.text import print_graph
from moecc.train.batches import TARGETS, TEACHER
from moecc.train.events import Teacher
from moecc.train.graphs import teacher_graph
from moecc.train.objectives import IGNORED
from moecc.train.recipe import GuardSection, OptimizerSection, Recipe
from moecc.train.scoring import Scorer, TokenScores
from moecc.train.settings import (
    ParamSettings,
    Phase,
    StepSpec,
    bias_counts,
    coefficients,
    counted,
    finished,
    moved,
    parameter_settings,
    phase_at,
    phases_of,
    totals_of,
)
from moecc.types import KEY, DType, TensorType
from moecc.types import Arrays as HostArrays
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.program import in_precision, machine_errors
from moecc_backends.xla.trace.values import Arrays, NamedArrays, Names, Outputs, PyTree, accumulator
from moecc_backends.xla.train.checkpoints import load
from moecc_backends.xla.train.gradients import (
    COEFFICIENT,
    DISTILL,
    LOSS_SUM,
    SUMS,
    TAUGHT,
    TOKENS,
    BatchLoss,
    StepShardings,
    batch_types,
    input_types,
    step_shardings,
    summed_outputs,
)
from moecc_backends.xla.train.optimizer import Optimizer, Settle


@dataclass(frozen=True)
class EvaluationStep:
    """A compiled evaluation.

    Attributes:
      graph: the graph of a micro-batch, in evaluation.
      where: the settings of the step, and where its arrays lie.
    """

    graph: Graph
    where: StepShardings

    @cached_property
    def function(self) -> PyTree:
        """The jitted ``(params, batch, key) → metrics``."""
        return jax.jit(self.pure)

    def used(self, params: PyTree) -> PyTree:
        """Return the parameters that the graph reads, by name."""
        return {n: params[n] for n, v in self.graph.params.items() if v.users}

    def pure(self, params: NamedArrays, batch: NamedArrays, key: Array) -> Outputs:
        """Return what `TrainStep.evaluate` returns, as a function to trace."""
        graph = self.graph
        types = {n: graph.params[n].type for n in params}
        totals = totals_for(graph, self.where, batch)
        types_of_arguments = (types, {**batch_types(graph), **dict.fromkeys(totals)}, None)
        loss = BatchLoss(graph, self.where)
        run = self.where.mapped(loss.values, types_of_arguments, sum_types(graph))
        sums: Outputs = run(params, {**batch, **totals}, key)
        return {**told(sums, graph), LOSS_SUM: sums[LOSS_SUM], "hits": sums["hits"]}


def totals_for(graph: Graph, where: StepShardings, batch: NamedArrays) -> Outputs:
    """Return the totals of a batch that the graph of a micro-batch takes."""
    totals = totals_of(graph)
    if not totals:
        return {}
    arrays = {**batch, **_masks(graph, where, batch)}
    parts = where.spec.config.micro_batches
    return {n: jnp.asarray(counted(t, arrays, parts), jnp.float32) for n, t in totals.items()}


def _masks(graph: Graph, where: StepShardings, batch: NamedArrays) -> Outputs:
    """Return the masks that `graph` computes of the inputs of a batch, and of nothing else."""
    masks = {n: v for n, v in graph.outputs.items() if n.startswith(MASK)}
    if not masks:
        return {}
    # The nodes that compute them, in order.
    needed: set[Node] = set()
    left = list(masks.values())
    while left:
        node = left.pop().node
        if node is not None and node not in needed:
            needed.add(node)
            left += node.operands
    nodes, config = [node for node in graph if node in needed], where.lowering
    types = {n: t for n, t in batch_types(graph).items() if n in graph.inputs}

    def run(inputs: NamedArrays) -> Outputs:
        values = config.lower(nodes, {graph.inputs[n]: a for n, a in inputs.items()})
        return {
            n: config.fresh().settled(values[v].to(v.type.names).array, v.type)
            for n, v in masks.items()
        }

    mapped = where.mapped(run, (types,), {n: v.type for n, v in masks.items()})
    return mapped({n: batch[n] for n in types})


def sum_types(graph: Graph) -> dict[str, TensorType | None]:
    """Return the types of the sums over a batch; None for what every device has."""
    outputs = {n: v.type for n, v in summed_outputs(graph).items()}
    return {**outputs, **dict.fromkeys(SUMS)}


def told(sums: Outputs, graph: Graph) -> Outputs:
    """Return the metrics of a step, made of sums over its batch.

    A loss stands there as it is, and times its coefficient, ``.scaled``.
    """
    metrics = {n: a for n, a in finished(sums).items() if n not in SUMS}
    for name, coefficient in coefficients(graph).items():
        if name in sums:
            metrics[f"{name}.scaled"] = coefficient * sums[name]
    count = jnp.maximum(sums[TOKENS], 1).astype(sums[LOSS_SUM].dtype)
    entropy = sums[LOSS_SUM] / count
    loss = entropy + sums.get(AUXILIARY, 0.0)
    return {
        **metrics,
        "loss": loss,
        "loss.cross_entropy": entropy,
        "loss.output_z": sums["output_z"] / count,
        "accuracy": sums["hits"] / count,
        TOKENS: sums[TOKENS],
    }


# Scores of rows: the loss of each row of a batch, as one compiled function.


def scorer(graph: Graph, params: HostArrays, *, dtype: DType) -> Scorer:
    """Return the scorer of `graph`; see `moecc.train.scoring.ScoringBackend`.

    Raises:
      InputError: the graph has no logits.
      MachineError: the memory of a device is too small; the scorer raises it, too.
    """
    check_trainable(graph)
    with machine_errors(), in_precision(dtype):
        placed = {n: jnp.asarray(params[n]) for n, v in graph.params.items() if v.users}
    model = function(graph, dtype=dtype)
    names = graph.outputs[LOGITS].type.names

    @jax.jit
    def scores(params: PyTree, inputs: PyTree, targets: Array) -> Arrays:
        logits = jnp.moveaxis(model(params, inputs)[LOGITS], names.index(VOCAB), -1)
        wide = logits.astype(accumulator(logits.dtype))
        counted = targets != IGNORED
        picked = jnp.take_along_axis(wide, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        losses = jax.nn.logsumexp(wide, axis=-1) - picked
        hits = jnp.argmax(wide, axis=-1) == targets
        return jnp.where(counted, losses, 0), counted, counted & hits

    @machine_errors()
    def score(batch: HostArrays) -> TokenScores:
        with in_precision(dtype):
            inputs = {n: jnp.asarray(a) for n, a in batch.items() if n in graph.inputs}
            keys = (n for n, v in graph.inputs.items() if v.type.dtype.kind == "key")
            inputs |= {name: jax.random.key(0) for name in keys}
            results = jax.device_get(scores(placed, inputs, jnp.asarray(batch[TARGETS])))
        losses, counted, hits = map(np.asarray, results)
        return TokenScores(losses.astype(np.float64), counted, hits)

    return score


# The guard of a step: what is not finite, or a spike of the loss, is not learned from.
#
# It is part of the compiled program, so that a bad step costs nothing but its time. When to go back
# to a checkpoint is the loop's to decide.

GuardState = dict[str, Array]
"""``losses`` of the last steps that were taken, and ``taken``, ``skipped``, ``in_a_row``."""


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
    ) -> tuple[Array, GuardState, Outputs]:
        """Return whether the step is taken, the state after it, and metrics.

        ``guard.limit`` is the largest loss that is taken, infinite until the window is full.

        Args:
          state: the state before it.
          loss: the loss of the batch.
          norm: the norm of its gradients.
        """
        section, losses, wide = self.section, state["losses"], loss.astype(jnp.float32)
        limit = jnp.asarray(jnp.inf, jnp.float32)
        if section.sigma:
            mean = jnp.mean(losses)
            # A deviation of nothing but rounding would make a spike of any loss.
            std = jnp.maximum(jnp.std(losses), 1e-4 * jnp.abs(mean))
            is_full = state["taken"] >= section.window
            limit = jnp.where(is_full, mean + section.sigma * std, limit)
        is_spike = wide > limit
        ok = jnp.isfinite(loss) & jnp.isfinite(norm) & ~is_spike
        after = {
            "losses": jnp.where(ok, losses.at[state["taken"] % section.window].set(wide), losses),
            "taken": state["taken"] + ok,
            "skipped": state["skipped"] + ~ok,
            "in_a_row": jnp.where(ok, 0, state["in_a_row"] + 1),
        }
        metrics = {
            "guard.skipped": ~ok,
            "guard.spike": is_spike,
            "guard.limit": limit,
            "guard.in_a_row": after["in_a_row"],
        }
        return ok, after, metrics


State = dict[str, PyTree]
"""``params`` and ``bias`` by name, ``moments`` by kind and name, ``guard``, ``step``."""


def _as_changed(after: PyTree, before: PyTree) -> PyTree:
    return after


@dataclass(frozen=True)
class TrainStep:
    """A compiled step of training, and where its state lies.

    Attributes:
      graph: the graph of a micro-batch.
      spec: what decides the step besides.
      where: how and where it is lowered.
      evaluation: the evaluation of the same parameters, if there is one.
    """

    graph: Graph
    spec: StepSpec
    where: StepShardings
    evaluation: EvaluationStep | None

    @cached_property
    def settings(self) -> dict[str, ParamSettings]:
        """How each parameter is trained, by its name in the graph; biases of balance are not."""
        settings = parameter_settings(self.graph, _section(self.spec))
        return {n: s for n, s in settings.items() if n not in self.biases}

    @cached_property
    def biases(self) -> dict[str, Names]:
        """The outputs that count choices, one for each layer, by the name of a balance bias."""
        return bias_counts(self.graph)

    @cached_property
    def trained(self) -> Names:
        """The parameters that have a gradient."""
        return tuple(n for n, s in self.settings.items() if s.trained)

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimiser of the trained parameters."""
        types = {n: self.graph.params[n].type for n in self.trained}
        return Optimizer(_section(self.spec), types, {n: self.settings[n] for n in self.trained})

    @cached_property
    def guard(self) -> Guard | None:
        """The guard, if there is one."""
        return None if self.spec.guard is None else Guard(self.spec.guard)

    def init(self, params: Mapping[str, PyTree]) -> State:
        """Return the state before the first step, where it belongs.

        Args:
          params: the parameters by name; those of this process's devices, or whole.

        Raises:
          InputError: a parameter is missing.
        """
        kinds = self.model_params(self.abstract_state)
        missing = [n for n in kinds if n not in params]
        if missing:
            raise InputError("a parameter is missing", expected=", ".join(missing[:5]))
        placed = {
            n: jax.device_put(jnp.asarray(params[n], kind.dtype), kind.sharding)
            for n, kind in kinds.items()
        }
        out = jax.tree.map(lambda a: a.sharding, self.abstract_state)
        return jax.jit(self._initial, out_shardings=out)(placed)

    def _initial(self, params: NamedArrays) -> State:
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
        values = self.graph.params
        params = {n: self.where.param(values[n]) for n in (*self.settings, *self.biases)}
        state: State = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.where.whole),
            jax.eval_shape(self._initial, params),
        )
        for group in ("params", "bias"):
            state[group] = {n: params[n] for n in state[group]}
        for kind, types in self.optimizer.moment_types.items():
            state["moments"][kind] = {
                n: _abstract_moment(t, values[n].type, params[n]) for n, t in types.items()
            }
        return state

    @cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes, types and shardings of a batch: the graph's inputs, and the targets.

        Where a model is distilled, the logits of the teacher, and the coefficient, too.
        """
        arrays = self.where.arrays(batch_types(self.graph))
        if self.spec.distill:
            logits = self.where.arrays({TEACHER: self.graph.outputs[LOGITS].type})[TEACHER]
            arrays[TEACHER] = logits.update(dtype=accumulator(logits.dtype))
            arrays[COEFFICIENT] = jax.ShapeDtypeStruct(
                (), np.dtype("float32"), sharding=self.where.whole
            )
        return arrays

    @property
    def arguments(self) -> tuple[PyTree, ...]:
        """What `step` takes, abstractly."""
        rate = jax.ShapeDtypeStruct((), np.dtype("float32"), sharding=self.where.whole)
        return self.abstract_state, self.abstract_batch, self.where.key, rate

    @cached_property
    def function(self) -> PyTree:
        """The jitted step ``(state, batch, key, rate) → (state, metrics)``; it takes the state."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state)
        return jax.jit(self.pure, donate_argnums=(0,), out_shardings=(shardings, None))

    def step(
        self, state: State, batch: NamedArrays, key: Array, rate: Array | float
    ) -> tuple[State, Outputs]:
        """Return the state after a step, and metrics; the state that is given is used up.

        Args:
          state: a state, as `init` returns it.
          batch: the graph's inputs, but for a key, and the targets ``[batch, seq]``, −1 for none.
          key: the random key of this step.
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
        judge = self.evaluation
        if judge is not None:
            held_out = {n: leaf for n, leaf in batch.items() if n not in TAUGHT}
            judge.function.trace(judge.used(self.model_params(state)), held_out, key)

    def evaluate(
        self, params: NamedArrays, batch: NamedArrays, key: Array | None = None
    ) -> Outputs:
        """Return metrics of a batch in evaluation, and the sums ``loss.sum``, ``hits``, ``tokens``.

        Args:
          params: all parameters of the graph, by name.
          batch: the graph's inputs, but for a key, and the targets ``[batch, seq]``, −1 for none.
          key: the random key, which policies may need in evaluation; a fixed one by default.
        """
        judge = self.evaluation
        assert judge is not None, "make_train_step was given the graph of evaluation"
        key = jax.random.key(0) if key is None else key
        return judge.function(judge.used(params), dict(batch), key)

    @staticmethod
    def model_params(state: State) -> Outputs:
        """Return all parameters of the graph: trained ones, frozen ones, and biases."""
        return {**state["params"], **state["bias"]}

    def pure(
        self, state: State, batch: NamedArrays, key: Array, rate: Array
    ) -> tuple[State, Outputs]:
        """Return what `step` returns, as a function to trace."""
        params = state["params"]
        trained = {n: params[n] for n in self.trained}
        fixed = {n: a for n, a in self.model_params(state).items() if n not in trained}
        slopes, sums = self.gradients(trained, fixed, batch, key)
        norm = gradient_norm(slopes)
        metrics = {**told(sums, self.graph), "gradient_norm": norm, "rate": rate}
        if self.spec.output_z:
            metrics["loss.output_z.scaled"] = self.spec.output_z * metrics["loss.output_z"]
            metrics["loss"] += metrics["loss.output_z.scaled"]
        if self.spec.distill:
            distance = metrics.pop(DISTILL) / jnp.maximum(sums[TOKENS], 1)
            metrics["loss.distill"] = distance
            metrics["loss.distill.scaled"] = batch[COEFFICIENT].astype(distance.dtype) * distance
            metrics["loss"] += metrics["loss.distill.scaled"]
        keep, guard = _as_changed, state["guard"]
        if self.guard is not None:
            ok, guard, more = self.guard(guard, metrics["loss"], norm)
            keep = partial(jax.tree.map, partial(jnp.where, ok))
            metrics |= more
        changed, moments = self.update(trained, state["moments"], slopes, norm, rate, keep)
        bias = dict(state["bias"])
        if self.spec.bias_rate:
            for name, before in state["bias"].items():
                # By the choices of the whole batch.
                counts = jnp.stack([sums[output] for output in self.biases[name]])
                after_step = moved(before, counts.reshape(before.shape), self.spec.bias_rate)
                bias[name] = after_step.astype(before.dtype)
        after = {
            "params": {**params, **keep(changed, trained)}, "moments": moments,
            "bias": keep(bias, state["bias"]), "guard": guard, "step": state["step"] + 1,
        }  # fmt: skip
        return after, metrics

    def gradients(
        self, trained: NamedArrays, fixed: NamedArrays, batch: NamedArrays, key: Array
    ) -> tuple[Outputs, Outputs]:
        """Return the gradients of trained parameters, and sums over the batch; to be traced."""
        graph = self.graph
        trained_types, fixed_types = (
            {n: graph.params[n].type for n in params} for params in (trained, fixed)
        )
        totals = totals_for(graph, self.where, batch)
        inputs = {**batch_types(graph), **dict.fromkeys(totals)}
        results = sum_types(graph)
        if self.spec.distill:
            inputs |= {TEACHER: graph.outputs[LOGITS].type, COEFFICIENT: None}
            results[DISTILL] = None
        run = self.where.mapped(
            BatchLoss(graph, self.where).gradients,
            (trained_types, fixed_types, inputs, None),
            (trained_types, results),
        )
        return run(trained, fixed, {**batch, **totals}, key)

    def update(
        self,
        trained: NamedArrays,
        moments: PyTree,
        slopes: NamedArrays,
        norm: Array,
        rate: Array,
        keep: Settle = _as_changed,
    ) -> tuple[Outputs, PyTree]:
        """Return what parameters become, and the moments that `keep` keeps; to trace."""

        def settle(after: PyTree, before: PyTree) -> PyTree:
            settled = keep(after, before)
            if self.where.lowering.options.target != "cpu":
                return settled
            # XLA for CPUs would compute the moments once more within the update of a parameter,
            # from those before, which it copies for that: with 30 M parameters a third more time
            # for this part of a step, and 608 MB of temporaries in place of 415.
            return jax.tree.map(jax.lax.optimization_barrier, settled)

        clip = _section(self.spec).clip
        if clip:
            factor = clip / jnp.maximum(norm, clip)
            slopes = {n: g * factor.astype(g.dtype) for n, g in slopes.items()}
        directions, after = self.optimizer.directions(slopes, moments, trained, settle)
        params = {}
        for name, direction in directions.items():
            param, settings = trained[name], self.settings[name]
            if settings.decay:
                direction = direction + settings.decay * param
            by = (rate * settings.rate_factor).astype(param.dtype)
            params[name] = param - by * direction.astype(param.dtype)
        return params, after


def _section(spec: StepSpec) -> OptimizerSection:
    """Return the optimiser's part of the recipe."""
    assert spec.optimizer is not None, "a step of training has an optimiser"
    return spec.optimizer


def _abstract_moment(
    type: TensorType, param: TensorType, abstract: jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
    """Return a moment, sharded along the axes that it has of its parameter."""
    sharding = abstract.sharding
    if isinstance(sharding, NamedSharding):
        parts = dict(zip(param.names, sharding.spec, strict=False))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*map(parts.get, type.names)))
    return jax.ShapeDtypeStruct(type.shape, abstract.dtype, sharding=sharding)


def gradient_norm(slopes: NamedArrays) -> Array:
    """Return the norm of all gradients together, in float32 at least."""
    squares = [jnp.sum(jnp.square(g.astype(accumulator(g.dtype)))) for g in slopes.values()]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def make_train_step(
    graph: Graph, spec: StepSpec, devices: list[jax.Device], evaluation: Graph | None = None
) -> TrainStep:
    """Return the step of `graph` over `devices`, which its mesh has as many of.

    Args:
      graph: the graph of a micro-batch, for training with its losses.
      spec: what decides the step besides.
      devices: the devices, in the order of the mesh.
      evaluation: the graph of a micro-batch in evaluation.

    Raises:
      InputError: the mesh or micro-batches cut a group of tokens, or the graph cannot be trained.
    """
    check_trainable(graph)
    judge = None
    if evaluation is not None:
        check_trainable(evaluation)
        judge = EvaluationStep(evaluation, step_shardings(evaluation, spec, devices))
    return TrainStep(graph, spec, step_shardings(graph, spec, devices), judge)


# The steps of a run whose groups of parameters are not all trained from the beginning.


@dataclass(frozen=True)
class PhasedStep:
    """A step of training for each phase of a run; a state knows by its moments which one it is of.

    Attributes:
      phases: the phases in order, one at least.
      steps: the step of each; they differ in what is trained.
    """

    phases: Sequence[Phase]
    steps: Sequence[TrainStep]

    def at(self, done: int) -> TrainStep:
        """Return the step that follows after so many."""
        return self.steps[phase_at(self.phases, done)]

    def step(
        self, state: State, batch: NamedArrays, key: Array, rate: Array | float
    ) -> tuple[State, Outputs]:
        """Return the state after a step, and metrics; see `TrainStep.step`."""
        return self._by_structure[jax.tree.structure(state)].step(state, batch, key, rate)

    def entered(self, state: State, done: int) -> State:
        """Return a state as it is after so many steps: with zeros for moments that are new."""
        program = self.at(done)
        if self._by_structure[jax.tree.structure(state)] is program:
            return state
        # Leaves by their paths, in order.
        wanted, present = (
            {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
            for tree in (program.abstract_state, state)
        )
        new = {path: kind for path, kind in wanted.items() if path not in present}
        zeros = jax.jit(
            lambda: {path: jnp.zeros(kind.shape, kind.dtype) for path, kind in new.items()},
            out_shardings={path: kind.sharding for path, kind in new.items()},
        )()
        leaves = [{**zeros, **present}[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(program.abstract_state), leaves)

    def model_params(self, state: State) -> Outputs:
        """Return all parameters of the graph; see `TrainStep.model_params`."""
        return self.steps[0].model_params(state)

    def evaluate(self, params: NamedArrays, batch: NamedArrays) -> Outputs:
        """Return the metrics of a batch in evaluation; see `TrainStep.evaluate`."""
        return self.steps[0].evaluate(params, batch)

    @cached_property
    def _by_structure(self) -> dict[PyTree, TrainStep]:
        return {jax.tree.structure(step.abstract_state): step for step in self.steps}


_SHARED: dict[str, PhasedStep] = {}
"""The last step: runs of a sweep that differ in rates, schedules or seeds share it."""


def shared_step(
    graph: Graph, spec: StepSpec, devices: list[jax.Device], evaluation: Graph
) -> PhasedStep:
    """Return the steps of `graph`, one for each phase; the last ones if they are the same programs.

    The rate is an argument of a program, so that what decides it is no part of the comparison.

    Raises:
      InputError: as `make_train_step`.
    """
    unset = OptimizerSection()
    section = replace(
        _section(spec), rate=unset.rate, schedule=unset.schedule, warmup=unset.warmup,
        decay_steps=unset.decay_steps, end_factor=unset.end_factor,
    )  # fmt: skip
    spec = replace(spec, optimizer=section)
    key = "\n".join((print_graph(graph), print_graph(evaluation), repr(spec), repr(devices)))
    if key not in _SHARED:
        _SHARED.clear()
        phases = phases_of(section)
        specs = [replace(spec, optimizer=phase.section) for phase in phases]
        first = make_train_step(graph, specs[0], devices, evaluation)
        steps = (first, *(replace(first, spec=later) for later in specs[1:]))
        _SHARED[key] = PhasedStep(phases, steps)
    return _SHARED[key]


# The training step or the forward pass of a graph on a mesh, ready to be compiled or run.
#
# No weights are needed: parameters, state and inputs are shapes, types and shardings. The step that
# is compiled ahead of time is the step that runs.


def make_step(
    graph: Graph, spec: StepSpec, devices: list[jax.Device]
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Return the jitted step of `graph` over `devices`, and what it takes, abstractly.

    Args:
      graph: the graph, for training with its losses.
      spec: how it is trained or run.
      devices: the devices in the order of the mesh, which has as many.

    Raises:
      InputError: the mesh cuts a group of tokens, or the graph cannot be trained.
    """
    if spec.optimizer is not None:
        step = make_train_step(graph, spec, devices)
        return step.function, step.arguments
    where = step_shardings(graph, spec, devices)
    params = {name: where.param(value) for name, value in graph.params.items() if value.users}
    inputs = where.arrays(input_types(graph))
    inputs |= {n: where.key for n, v in graph.inputs.items() if v.type.dtype == KEY}
    return jax.jit(where.model(graph)), (params, inputs)


@dataclass(frozen=True)
class TeacherProgram:
    """The source that a model is distilled from, on the devices of the model.

    Attributes:
      logits: the compiled ``(params, inputs) → logits``.
      params: its parameters.
      inputs: the names of the inputs that it reads.
      keys: its random keys, by name.
      shape: shape and type of its logits.
      coefficient: returns the coefficient of the divergence in a step, by its number.
    """

    logits: PyTree
    params: NamedArrays
    inputs: tuple[str, ...]
    keys: NamedArrays
    shape: jax.ShapeDtypeStruct
    coefficient: Callable[[int], float]

    def __call__(self, batch: NamedArrays, step: int) -> Outputs:
        """Return the logits of a batch, zeros once they do not count, and their coefficient."""
        coefficient = self.coefficient(step)
        logits = jnp.zeros(self.shape.shape, self.shape.dtype, device=self.shape.sharding)
        if coefficient:
            inputs = {name: batch[name] for name in self.inputs} | dict(self.keys)
            logits = self.logits(self.params, inputs)
        return {TEACHER: logits, COEFFICIENT: jnp.float32(coefficient)}


def teacher_program(teacher: Teacher, recipe: Recipe, step: TrainStep) -> TeacherProgram:
    """Return the program of a teacher.

    Args:
      teacher: the source.
      recipe: the recipe.
      step: the step that it teaches.

    Raises:
      InputError: its logits are not like those of the model.
    """
    graph = teacher_graph(teacher.graph, recipe, step.graph)
    where = step_shardings(graph, step.spec, step.where.devices)
    abstract = {name: where.param(value) for name, value in graph.params.items() if value.users}
    model, shape = where.model(graph), step.abstract_batch[TEACHER]

    def logits(params: NamedArrays, inputs: NamedArrays) -> jax.Array:
        return model(params, inputs)[LOGITS].astype(shape.dtype)

    keys = [name for name, value in graph.inputs.items() if value.type.dtype == KEY]
    return TeacherProgram(
        jax.jit(logits), load(graph, teacher.weights, teacher.read, abstract),
        tuple(name for name in graph.inputs if name not in keys),
        {name: jax.random.key(0) for name in keys}, shape,
        lambda number: recipe.loss.distill_at(number, recipe.run.steps),
    )  # fmt: skip
