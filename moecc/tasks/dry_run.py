"""What a run of training would be: sizes, FLOPs, passes, and what a plan predicts of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from moecc.families.describe import count_parameters, sequence_flops
from moecc.ir.graph import Graph
from moecc.ir.unroll import unrolled
from moecc.plan.batches import Batch, length_variables
from moecc.plan.machines import Machine, parse_machine
from moecc.plan.search import search
from moecc.plan.step import OPTIMIZERS
from moecc.plan.time import Estimate
from moecc.plan.workload import Workload, workload
from moecc.sharding.vias import LOCAL
from moecc.support.text import amount, count_text, size_text
from moecc.support.untyped import JsonDict
from moecc.train.batches import Batches
from moecc.train.graphs import StepPasses, eval_passes, step_graph, train_passes
from moecc.train.recipe import Recipe
from moecc.train.settings import moment_types, parameter_settings
from moecc.types import float_type

TRAIN_PASSES = 3
"""FLOPs of a training step over those of its forward pass: backward, there are twice as many."""

_DAY_SECONDS = 86_400

Facts = JsonDict


def dry_run(
    recipe: Recipe, graph: Graph, batches: Batches, machine: Machine | None = None
) -> Facts:
    """Return what a run would be, as JSON values; nothing is read but headers.

    Args:
      recipe: the recipe.
      graph: the canonical graph of the model.
      batches: its data.
      machine: what a plan is made for; by default CPUs, as many as the mesh of the recipe has.

    Raises:
      InputError: the recipe does not suit the graph, or it does not fit the machine.
    """
    graph = unrolled(graph)
    training = train_passes(graph, recipe)
    where = machine or _own_machine(recipe)
    return {
        "steps": recipe.run.steps,
        "parameters": _parameters(recipe, graph),
        "data": _data(recipe, batches),
        "flops": _flops(recipe, graph, batches),
        "passes": {"train": str(training), "evaluate": str(eval_passes(graph, recipe))},
        "plan": _plan(recipe, graph, batches, where),
    }


def dry_run_text(facts: Facts) -> str:
    """Return `dry_run` for people."""
    return "\n".join(_lines(facts))


def _own_machine(recipe: Recipe) -> Machine:
    mesh = recipe.step_config.device_mesh
    return parse_machine(f"cpu:{1 if mesh is None else mesh.devices}")


def _parameters(recipe: Recipe, graph: Graph) -> Facts:
    """Return the parameters, how many are used for a token and trained, and their bytes."""
    counts = count_parameters(graph)
    settings = parameter_settings(graph, recipe.optimizer)
    types = {name: graph.params[name].type for name in settings}
    trained = [name for name, one in settings.items() if one.trained]
    moments = moment_types(recipe.optimizer.name, types, settings)
    width = float_type(recipe.run.weight_dtype).itemsize_bytes
    kept = sum(prod(t.shape) for of_kind in moments.values() for t in of_kind.values())
    return {
        "total": counts.total,
        "active": counts.active,
        "trained": sum(prod(types[name].shape) for name in trained),
        "bytes": counts.total * width,
        "moment_bytes": kept * width,
    }


def _data(recipe: Recipe, batches: Batches) -> Facts:
    """Return the tokens of the run, padding included, and the epochs of each corpus."""
    data, shape = recipe.data, batches.shape
    rows = data.batch * recipe.run.steps
    whole = sum(corpus.weight for corpus in data.train)
    shares = zip(batches.rows.items(), data.train, strict=True)
    return {
        "sequences": data.batch,
        "seq": shape.seq,
        "decoder_seq": shape.decoder_seq,
        "tokens": rows * (shape.seq + shape.decoder_seq),
        "epochs": {name: rows * c.weight / whole / count for (name, count), c in shares},
    }


def _flops(recipe: Recipe, graph: Graph, batches: Batches) -> Facts:
    """Return the model's FLOPs: of a token, forward, and of the run, forward and backward."""
    lengths = dict(_lengths(graph, batches))
    counted = sequence_flops(graph, lengths)
    sequence = counted.weights + counted.attention
    return {
        "forward_per_token": sequence / max(sum(lengths.values()), 1),
        "run": float(TRAIN_PASSES * sequence * recipe.data.batch * recipe.run.steps),
    }


def _planned_graph(graph: Graph, training: StepPasses) -> Graph:
    """Return the graph that is planned: in its mode, unrolled and on no mesh, as plans take it."""
    passes = replace(training, losses=None, mesh=None, rolled=False)
    return step_graph(graph, passes)


def _plan(recipe: Recipe, graph: Graph, batches: Batches, machine: Machine) -> Facts:
    """Return what a plan predicts of time and memory, as JSON values."""
    found = planned_step(recipe, graph, dict(_lengths(graph, batches)), machine)
    return {
        "machine": machine.name,
        "strategy": str(found.strategy),
        "step_seconds": found.seconds,
        "seconds": found.seconds * recipe.run.steps,
        "tokens_per_second": _tokens(batches) / found.seconds,
        "memory_bytes": found.memory.total,
        "usable_bytes": machine.usable_bytes,
    }


def planned_step(
    recipe: Recipe, graph: Graph, lengths: Mapping[str, int], machine: Machine
) -> Estimate:
    """Return what a plan predicts of the step that would be run.

    The mesh of a recipe leaves no way to the experts open, and shards no other weights over them.

    Args:
      recipe: the recipe.
      graph: the canonical graph of the model, unrolled.
      lengths: what the length variables of the graph stand for.
      machine: what is planned for.

    Raises:
      InputError: it does not fit the machine.
    """
    training = train_passes(graph, recipe)
    on, planned = training.mesh, _planned_graph(graph, training)
    config = recipe.step_config
    config = replace(
        config,
        optimizer=config.optimizer if config.optimizer in OPTIMIZERS else OPTIMIZERS[0],
        via=on.via if on is not None and on.via != LOCAL else config.via,
        dense_weights="whole" if config.mesh and not config.rules else None,
    )

    def work_on(other: Machine, parts: int) -> Workload:
        batch = Batch(recipe.data.batch // parts, tuple(lengths.items()))
        return workload(planned, batch)

    part = work_on(machine, config.micro_batches)
    return search(part, machine, config, keep=0, work_on=work_on, spelling=as_setting).best


def as_setting(name: str, value: str) -> str:
    """Return a field and its value as `moecc train` takes them."""
    key = {"mesh": "mesh.mesh", "optimizer": "optimizer.name"}.get(name, f"run.{name}")
    return f"--set {key}={value}"


def _lengths(graph: Graph, batches: Batches) -> Iterator[tuple[str, int]]:
    """Yield the length that each variable of the graph stands for."""
    shape = batches.shape
    yield from zip(length_variables(graph), (shape.seq, shape.decoder_seq), strict=False)


def _tokens(batches: Batches) -> int:
    shape = batches.shape
    return shape.batch * (shape.seq + shape.decoder_seq)


def _lines(facts: Facts) -> Iterator[str]:
    parameters, data, plan = facts["parameters"], facts["data"], facts["plan"]
    yield (
        f"parameters   {count_text(parameters['total'])}, {count_text(parameters['active'])} for "
        f"a token, {count_text(parameters['trained'])} trained: {size_text(parameters['bytes'])}"
    )
    yield f"moments      {size_text(parameters['moment_bytes'])}"
    lengths = f"{data['seq']}" + (f" + {data['decoder_seq']}" if data["decoder_seq"] else "")
    steps, tokens = amount(facts["steps"], "step"), count_text(data["tokens"])
    yield f"data         {steps} of {data['sequences']:,} x {lengths} tokens: {tokens}"
    for name, epochs in data["epochs"].items():
        yield f"             {epochs:.2f} epochs of {name}"
    yield (
        f"FLOPs        {facts['flops']['forward_per_token']:.3g} a token forward, "
        f"{facts['flops']['run']:.3g} in all"
    )
    yield f"training     {facts['passes']['train']}"
    yield f"evaluation   {facts['passes']['evaluate']}"
    yield f"plan         {plan['machine']}: {plan['strategy']}"
    yield (
        f"             {_time(plan['step_seconds'])} a step, {_time(plan['seconds'])} in all; "
        f"{size_text(plan['memory_bytes'])} of {size_text(plan['usable_bytes'])} a device"
    )


def _time(seconds: float) -> str:
    """Return a time for people."""
    for unit, size in (("days", _DAY_SECONDS), ("h", 3600), ("min", 60), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"
