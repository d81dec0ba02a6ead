"""``moecc train``: train a model by a recipe; go on with a run, or fork it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Annotated

from moecc.backend import backend_with
from moecc.errors import CheckError, MoeccError, Problem, UsageError, raise_problems, shown
from moecc.families.describe import count_parameters, sequence_flops
from moecc.formats.run import is_run, saved_steps
from moecc.formats.store import is_address
from moecc.ir.graph import Graph
from moecc.ir.unroll import unrolled
from moecc.jobs.command import Load, OptionalMachine, Report, SavedPlanFile, Spelling
from moecc.jobs.training import exported, forked_run, new_run, open_source, resumed_run
from moecc.model.open import registry_with
from moecc.plan.machines import (
    Machine,
    find_machine,
    fraction_remark,
    memory_fraction,
    parse_machine,
)
from moecc.plan.report import attention_json, attention_text
from moecc.plan.search import search
from moecc.plan.step import OPTIMIZERS, TRAIN_PASSES, SavedPlan, read_plan
from moecc.plan.time import Estimate
from moecc.plan.workload import Batch, Workload, length_variables, workload
from moecc.rewrite.pipeline import Pipeline
from moecc.sharding.vias import LOCAL
from moecc.support.console import PROGRESS, is_quiet, say, use_colour
from moecc.support.extras import require
from moecc.support.process import Closing, StopRequest, signals_noted
from moecc.support.text import (
    amount,
    count_text,
    duration_text,
    merge_remarks,
    size_text,
    time_text,
)
from moecc.support.untyped import JsonDict
from moecc.train.batches import Batches, BatchShape, run_remarks
from moecc.train.events import (
    Evaluated,
    Event,
    Exported,
    Reason,
    Saved,
    Skipped,
    Stepped,
    StepWork,
    Stopped,
    TensorBoard,
    Tracker,
    Trainer,
    Training,
    TrainJob,
    Watch,
    WeightsAndBiases,
    tracked,
)
from moecc.train.graphs import eval_passes, planning_graph, train_passes, training_remarks
from moecc.train.recipe import Recipe
from moecc.train.recipe_text import load_recipe
from moecc.train.run import followed
from moecc.train.settings import moment_types, parameter_settings
from moecc.train.stored_run import StoredRun
from moecc.types import float_type

# How a training goes: a line on a terminal that changes, or lines now and then.

LINE_SECONDS = 10.0
"""Where the standard error is no terminal: at most a line of steps in so many seconds."""

_REFRESH_SECONDS = 0.2
_FORGETTING = 0.9


class TrainProgress(Closing):
    """Shows the events of a training on the standard error.

    Args:
      steps: of the whole run.
      quiet: whether nothing is shown, as in all processes but the first.
      predicted: tokens a second of a plan, of which the share that is reached is shown.
    """

    def __init__(self, steps: int, *, quiet: bool = False, predicted: float | None = None) -> None:
        PROGRESS.set()
        self._steps, self._quiet, self._predicted = steps, quiet or is_quiet(), predicted
        self._is_live = use_colour()
        self._shown_seconds = -LINE_SECONDS
        self._tokens = 0
        self._rate = 0.0
        self._step_seconds = 0.0
        self._watch = Watch()
        self._is_open = False

    def close(self) -> None:
        """End the line that is rewritten."""
        if self._is_open:
            print(file=sys.stderr)
        self._is_open = False

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if self._quiet:
            return
        match event:
            case Stepped():
                self._stepped(event)
            case Skipped() if event.back_to is not None:
                gone = ", ".join(map(str, event.left_out))
                self._say(f"back to step {event.back_to:,}; left out: batches {gone}")
            case Skipped():
                self._say(f"step {event.step:,} skipped: {'; '.join(map(str, event.faults))}")
            case Evaluated():
                each = ", ".join(f"{name} {loss:.4f}" for name, loss in event.losses.items())
                self._say(f"step {event.step:,}: held out {each}")
            case Saved():
                best = ", the best" if event.best else ""
                self._say(f"step {event.step:,}: saved to {shown(event.folder)}{best}")
            case Exported():
                self._say(f"step {event.step:,}: exported to {shown(event.folder)}")
            case Stopped():
                self.close()

    def _stepped(self, event: Stepped) -> None:
        for alarm in self._watch(event.step, event.metrics):
            self._say(f"alarm: {alarm}")
        is_first = not self._tokens
        tokens, self._tokens = event.tokens - self._tokens, event.tokens
        if not is_first:
            weight = _FORGETTING if self._rate else 0.0
            self._rate = weight * self._rate + (1 - weight) * tokens / max(event.seconds, 1e-9)
            self._step_seconds = weight * self._step_seconds + (1 - weight) * event.seconds
        now = time.monotonic()
        wait = _REFRESH_SECONDS if self._is_live else LINE_SECONDS
        if now - self._shown_seconds < wait and event.step != self._steps:
            return
        self._shown_seconds = now
        loss = event.metrics.get("loss")
        shown = f"{loss:.4f}" if isinstance(loss, float) else str(loss)
        pace = (
            f"{duration_text(event.seconds)} with its compilation"
            if is_first
            else self._pace(event)
        )
        text = f"step {event.step:,} of {self._steps:,}  loss {shown}  {pace}"
        if not self._is_live:
            say(text)
            return
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        self._is_open = True

    def _pace(self, event: Stepped) -> str:
        left = duration_text((self._steps - event.step) * self._step_seconds)
        plan = self._predicted
        share = "" if plan is None else f" ({self._rate / plan:.0%} of the plan)"
        share += f" {event.speed['mfu']:.1%} of the peak" if "mfu" in event.speed else ""
        return f"{count_text(round(self._rate))} tokens/s{share}  {left} left"

    def _say(self, text: str) -> None:
        self.close()
        say(text)


# What a run of training would be: sizes, FLOPs, passes, and what a plan predicts of it.


def dry_run_facts(
    recipe: Recipe, graph: Graph, batches: Batches, machine: Machine | None
) -> JsonDict:
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
    mesh = recipe.step_config.device_mesh
    where = machine or parse_machine(f"cpu:{1 if mesh is None else mesh.devices}")
    data, shape = recipe.data, batches.shape
    lengths = _lengths(graph, shape)
    counted = sequence_flops(graph, lengths)
    rows, tokens = data.batch * recipe.run.steps, shape.seq + shape.decoder_seq
    counts = count_parameters(graph)
    settings = parameter_settings(graph, recipe.optimizer)
    types = {name: graph.params[name].type for name in settings}
    trained = [name for name, setting in settings.items() if setting.trained]
    moments = moment_types(recipe.optimizer.name, types, settings)
    width = float_type(recipe.run.weight_dtype).itemsize_bytes
    moment_count = sum(prod(t.shape) for of_kind in moments.values() for t in of_kind.values())
    planned = planned_step(recipe, graph, lengths, where)
    return {
        "steps": recipe.run.steps,
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "trained": sum(prod(types[name].shape) for name in trained),
            "bytes": counts.total * width,
            "moment_bytes": moment_count * width,
        },
        "groups": [
            {
                "match": group.match,
                "rate": 0.0 if group.freeze else group.rate_factor * recipe.optimizer.rate,
                "from_step": group.from_step,
            }
            for group in recipe.optimizer.groups
        ],
        "data": {
            "sequences": data.batch,
            "seq": shape.seq,
            "decoder_seq": shape.decoder_seq,
            "tokens": rows * tokens,
            "epochs": batches.epochs(recipe),
        },
        "flops": {
            "forward_per_token": counted.per_token,
            "run": float(TRAIN_PASSES * counted.executed * rows),
        },
        "passes": {"train": str(training), "evaluate": str(eval_passes(graph, recipe))},
        "plan": {
            "machine": where.name, "strategy": str(planned.strategy),
            "step_seconds": planned.seconds, "seconds": planned.seconds * recipe.run.steps,
            "tokens_per_second": shape.batch * tokens / planned.seconds,
            "memory_bytes": planned.memory.total, "usable_bytes": where.usable_bytes,
            "memory_fraction": memory_fraction(where, planned.memory.total),
            "attention": attention_json(planned),
        },
    }  # fmt: skip


def _lengths(graph: Graph, shape: BatchShape) -> dict[str, int]:
    """Return the tokens of a sequence by the length variables of the graph."""
    return dict(zip(length_variables(graph), (shape.seq, shape.decoder_seq), strict=False))


def step_work(
    job: TrainJob, devices: int, machine: Machine | None, tokens_per_second: float | None
) -> StepWork:
    """Return the work of a step of a run.

    Args:
      job: the run.
      devices: how many it runs on.
      machine: their kind; None: not known.
      tokens_per_second: of all devices, by a plan.
    """
    graph, shape, batch = unrolled(job.graph), job.batches.shape, job.recipe.data.batch
    lengths = _lengths(graph, shape)
    flops = TRAIN_PASSES * sequence_flops(graph, lengths).executed * batch
    peak = None if machine is None else machine.peak(job.recipe.run.dtype) * devices
    tokens = batch * (shape.seq + shape.decoder_seq)
    return StepWork(flops, peak, None if tokens_per_second is None else tokens / tokens_per_second)


def dry_run_text(facts: JsonDict) -> str:
    """Return `dry_run` for people."""
    return "\n".join(_lines(facts))


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
    on, planned = training.mesh, planning_graph(graph, training)
    config = recipe.step_config
    config = replace(
        config,
        optimizer=config.optimizer if config.optimizer in OPTIMIZERS else OPTIMIZERS[0],
        via=on.via if on is not None and on.via != LOCAL else config.via,
        dense_weights="whole" if config.mesh and not config.rules else None,
    )

    def work_on(device: Machine, parts: int) -> Workload:
        batch = Batch(recipe.data.batch // parts, tuple(lengths.items()))
        return workload(planned, batch)

    part = work_on(machine, config.micro_batches)
    return search(part, machine, config, work_on, keep=0, spelling=as_setting).best


def as_setting(name: str, value: str) -> str:
    """Return a field and its value as `moecc train` takes them."""
    key = {"mesh": "mesh.mesh", "optimizer": "optimizer.name"}.get(name, f"run.{name}")
    return f"--set {key}={value}"


def _lines(facts: JsonDict) -> Iterator[str]:
    parameters, data, plan = facts["parameters"], facts["data"], facts["plan"]
    yield (
        f"parameters   {count_text(parameters['total'])}, {count_text(parameters['active'])} for "
        f"a token, {count_text(parameters['trained'])} trained: {size_text(parameters['bytes'])}"
    )
    yield f"moments      {size_text(parameters['moment_bytes'])}"
    for group in facts["groups"]:
        later = f" from step {group['from_step']:,}" if group["from_step"] else ""
        rate = f"a rate of at most {group['rate']:.3g}{later}" if group["rate"] else "frozen"
        yield f"group        {group['match']}: {rate}"
    lengths = f"{data['seq']}" + (f" + {data['decoder_seq']}" if data["decoder_seq"] else "")
    steps, tokens = amount(facts["steps"], "step"), count_text(data["tokens"])
    yield f"data         {steps} of {data['sequences']:,} x {lengths} tokens: {tokens}"
    for name, epochs in data["epochs"].items():
        yield f"             {epochs:.2f} epochs of {name}"
    yield (
        f"FLOPs        {count_text(facts['flops']['forward_per_token'])} a token forward, "
        f"{facts['flops']['run']:.3g} in all"
    )
    yield f"training     {facts['passes']['train']}"
    yield f"evaluation   {facts['passes']['evaluate']}"
    yield f"plan         {plan['machine']}: {plan['strategy']}"
    a_step, run = time_text(plan["step_seconds"]), time_text(plan["seconds"])
    yield (
        f"             {a_step} a step, {run} in all; "
        f"{size_text(plan['memory_bytes'])} of {size_text(plan['usable_bytes'])} a device"
    )
    memory = plan["memory_bytes"], plan["usable_bytes"]
    if remark := fraction_remark(plan["memory_fraction"], *memory):
        yield f"             {remark}"
    for choice in plan["attention"]:
        yield f"attention    {attention_text(choice)}"


# Whether a saved plan is of the step that a recipe trains.

_HINT = "moecc plan MODEL -p PIPELINE --save FILE, of the recipe's model and passes"


def plan_problems(plan: SavedPlan, recipe: Recipe, graph: Graph, path: str) -> Iterator[Problem]:
    """Yield why a plan is not of a training step, or of other passes or sizes than a run's model.

    A model that was converted before needs no passes, so that passes are compared where both plan
    and recipe have some.

    Args:
      plan: the plan.
      recipe: of the run.
      graph: of the run's model.
      path: of the plan, for messages.
    """
    yield from pass_problems(plan, recipe, path)
    section = recipe.model
    count = count_parameters(graph).total
    if plan.parameters not in (None, count):
        planned = f"{plan.parameters:,}, of {plan.model} with {plan.pipeline or 'no passes'}"
        trained = f"{count:,}, of {section.source} with {section.pipeline or 'no passes'}"
        yield Problem("the plan is of a model with other parameters", f"{path}: parameters",
                      trained, planned, _HINT)  # fmt: skip


def pass_problems(plan: SavedPlan, recipe: Recipe, path: str) -> Iterator[Problem]:
    """Yield why a plan is not of a training step, or of other passes than a recipe's model."""
    passes = recipe.model.pipeline
    if not plan.config.train:
        yield Problem("the plan is of another step", f"{path}: request.step", "train",
                      plan.config.step, "moecc plan … --step train --save FILE")  # fmt: skip
    is_dense = plan.experts == 0 and not plan.pipeline and _makes_experts(passes)
    if is_dense or (plan.pipeline and passes and _passes(plan.pipeline) != _passes(passes)):
        yield Problem("the plan is of other passes", f"{path}: request.pipeline",
                      f"{passes}, as model.pipeline is",
                      plan.pipeline or "no passes, and no experts", _HINT)  # fmt: skip


def _makes_experts(passes: str) -> bool:
    """Whether a pass of a pipeline has an option for the number of experts."""
    items = _passes(passes)
    return isinstance(items, tuple) and any(hasattr(item, "experts") for item in items)


def _passes(text: str) -> object:
    """Return passes so that equal ones compare equal; those of a user's file stay text.

    Training packs rows by itself, so that the pass may stand in the plan alone.
    """
    try:
        return tuple(item for item in Pipeline.parse(text) if item.name != "pack-segments")
    except MoeccError:
        return text


def plan_remarks(plan: SavedPlan, job: TrainJob) -> list[str]:
    """Return what a plan's figures are of that the run has otherwise.

    None of it makes the mesh of the plan wrong.
    """
    recipe, shape = job.recipe, job.batches.shape
    pairs = (
        ("optimizer", plan.config.optimizer, recipe.optimizer.name),
        ("dtype", plan.config.dtype, recipe.run.dtype),
    )
    differences = [f"{name} {said}, here {has}" for name, said, has in pairs if said != has]
    remarks = []
    if differences:
        text = f"the plan's time and memory are of other settings: {'; '.join(differences)}"
        remarks.append(text)
    lengths = (shape.seq, shape.decoder_seq)[: len(plan.lengths)]
    if plan.sequences and plan.lengths and (plan.sequences, plan.lengths) != (shape.batch, lengths):
        keys = ("data.batch", "data.seq", "data.decoder_seq")
        sets = zip(keys, (plan.sequences, *plan.lengths), strict=False)
        remarks.append(
            f"planned for {amount(plan.sequences, 'sequence')} of {_joined(plan.lengths)}, this "
            f"run has {shape.batch:,} of {_joined(lengths)}: "
            + " ".join(f"--set {key}={value}" for key, value in sets)
        )
    return remarks


def _joined(lengths: Sequence[int]) -> str:
    return " and ".join(map(str, lengths))


def train(
    recipe: Annotated[str | None, Spelling("[RECIPE]")] = None,
    *,
    out: Annotated[str | None, Spelling("RUN")] = None,
    resume: Annotated[str | None, Spelling("RUN")] = None,
    fork: Annotated[str | None, Spelling("RUN[@STEP]")] = None,
    set: Annotated[Sequence[str], Spelling("KEY=VALUE")] = (),
    plan: SavedPlanFile = None,
    dry_run: bool = False,
    machine: OptionalMachine = None,
    profile: Annotated[int, Spelling("STEPS", low=0)] = 0,
    tensorboard: bool = False,
    wandb: Annotated[str | None, Spelling("PROJECT")] = None,
    load: Load = (),
) -> Report:
    """Train the model of a recipe, or resume a run.

    Everything is checked before the folder is made.  SIGTERM and Ctrl-C finish the step and save;
    then the same command, or --resume, goes on as if nothing had been.  The exit code is 3 where
    too many steps in a row had to be skipped.

    Args:
      recipe: File of a recipe, or recipe:NAME.
      out: Folder of the run to write, local or in an object store; one with a run of the same
        recipe is continued.
      resume: Run to continue where it was saved.
      fork: Run to continue from a step, under another recipe and in another folder.
      set: Value of the recipe to replace, for example run.steps=500; may be repeated.
      dry_run: Check everything, report, and train nothing.
      machine: Machine that a dry run plans for, and whose peak a step is compared with, as moecc
        plan takes it.
      profile: Number of steps to trace for xprof, after two that warm up; in RUN/profile.
      tensorboard: Also write event files of TensorBoard to the folder of the run.
      wandb: Also log to this Weights & Biases project.

    Example:
      moecc train recipe:upcycle --out run --set model.source=SmolLM2-135M
    """
    tracker_extras = ["tensorboard"] * tensorboard + ["wandb"] * (wandb is not None)
    require("training", ["train"] * (not dry_run) + tracker_extras)
    with ExitStack() as opened:
        saved = None if plan is None else read_plan(plan)
        sets = [*(saved.recipe_values(is_new=resume is None) if saved else ()), *set]
        address = next((a for a in (out, resume) if a is not None and is_address(a)), None)
        stored = None if address is None else StoredRun(address)

        def check_plan(recipe: Recipe, graph: Graph) -> None:
            if saved is not None:
                raise_problems(plan_problems(saved, recipe, graph, str(plan)))

        job = _job(opened, recipe, out, resume, fork, sets, load, stored, check_plan)
        check_plan(job.recipe, job.graph)
        job = replace(job, traced_steps=profile)
        remarks = [
            *training_remarks(job.graph, job.recipe),
            *job.batches.remarks,
            *run_remarks(job.batches, job.recipe),
        ]
        if saved is not None:
            remarks += plan_remarks(saved, job)
        for remark in remarks:
            say(f"remark: {remark}")
        asked = machine or (saved and saved.machine)
        where = find_machine(asked) if asked else None
        if dry_run:
            facts = dry_run_facts(job.recipe, job.graph, job.batches, where)
            return Report("train-dry-run", facts, lambda: dry_run_text(facts))
        note = "" if is_quiet() else "finishing the step, then saving; a second signal ends at once"
        noted = opened.enter_context(signals_noted(note))
        training = opened.enter_context(backend_with(Trainer).train(job))
        trackers = _trackers(job, tensorboard, wandb) if training.writes else []
        predicted = None if saved is None else saved.tokens_per_second
        work = step_work(job, training.devices, where, predicted)
        stopped = _watch(job, training, noted, trackers, work, predicted)
        if stored is not None:
            stored.finish(is_done=stopped.reason is Reason.DONE)
    return _outcome(stopped, job, training.writes)


def _job(
    opened: ExitStack,
    recipe: str | None,
    out: str | None,
    resume: str | None,
    fork: str | None,
    sets: Sequence[str],
    load: Sequence[str],
    stored: StoredRun | None,
    check_plan: Callable[[Recipe, Graph], None],
) -> TrainJob:
    """Return the job of one of the three forms. Raises UsageError for anything else."""
    if resume is not None or fork is not None:
        registry_with(load)
    if resume is not None:
        if fork is not None:
            raise UsageError("--resume goes on with a run, and --fork begins another from it",
                             hint="leave --fork out, or --resume: one of them")  # fmt: skip
        if out is not None:
            raise UsageError("--resume goes on with a run where it is", hint="leave --out out")
        expected = None if recipe is None else load_recipe(recipe, sets)
        if stored is None:
            return resumed_run(Path(resume), sets, expected, load)
        run = stored.mirror() or stored.stage
        return stored.job(resumed_run(run, sets, expected, load), is_new=False)
    if recipe is None or out is None:
        raise UsageError(
            "not what moecc train takes",
            expected="RECIPE --out RUN, or --resume RUN, or RECIPE --fork RUN --out RUN2",
            found=f"no {'RECIPE' if recipe is None else '--out'}",
        )
    run = Path(out)
    is_new = fork is None and stored is None and not is_run(run)
    loaded = load_recipe(recipe, sets, check_paths=is_new)
    if stored is not None:
        run = stored.mirror() or stored.stage
    if fork is None and is_run(run) and not (stored and run == stored.stage):
        # Schedulers start a job again with the command that began it.
        registry_with(load)
        job = resumed_run(run, sets, loaded, load)
        state = "goes on from its last checkpoint" if saved_steps(run) else "has no step yet"
        say(f"remark: {out} is a run already, which {state}")
        return job if stored is None else stored.job(job, is_new=False)
    if stored is not None and run == stored.stage:
        stored.clear_stage()
    if fork is not None:
        job = forked_run(loaded, fork, run)
    else:
        source = opened.enter_context(open_source(loaded, load))
        for remark in merge_remarks(source.remarks):
            say(f"remark: {remark}")
        # The mesh of a plan of another model need not divide this one: name the plan first.
        check_plan(loaded, source.canonical.graph)
        job = new_run(loaded, source, run)
    return job if stored is None else stored.job(job, is_new=True)


def _watch(
    job: TrainJob,
    training: Training,
    noted: StopRequest,
    trackers: Sequence[Tracker],
    work: StepWork,
    predicted: float | None,
) -> Stopped:
    """Run a training to its end, and show its progress."""
    from signal import SIGINT

    def stop() -> Reason | None:
        if noted.signal is None:
            return None
        return Reason.INTERRUPTED if noted.signal is SIGINT else Reason.TERMINATED

    events = followed(job, training, stop, work)
    if training.writes:
        events = tracked(exported(job, events), trackers, job.recipe.run.log_steps)
    quiet = not training.writes
    with TrainProgress(job.recipe.run.steps, quiet=quiet, predicted=predicted) as progress:
        for event in events:
            progress(event)
            if isinstance(event, Stopped):
                return event
    raise AssertionError("a training ends with Stopped")


def _trackers(job: TrainJob, tensorboard: bool, wandb: str | None) -> list[Tracker]:
    """Return the places besides the journal to which metrics go."""
    steps = saved_steps(job.run)
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(job.run, steps[-1].number if steps else 0))
    if wandb is not None:
        trackers.append(WeightsAndBiases(job.run, wandb, asdict(job.recipe)))
    return trackers


def _outcome(stopped: Stopped, job: TrainJob, writes: bool) -> Report:
    """Return the report of a training; processes that do not write print none."""
    error = None
    if stopped.reason is Reason.GUARD:
        skips = job.recipe.run.guard.skips
        error = CheckError(
            f"training gave up: {'; '.join(map(str, stopped.faults))}",
            where=f"{job.run}, after step {stopped.step:,}",
            found=f"{skips} skipped steps in a row, twice after the same checkpoint",
            hint="a lower optimizer.rate, or a longer warm-up; metrics.jsonl has the faults of all",
        )
    code = {Reason.TERMINATED: 143, Reason.INTERRUPTED: 130}.get(stopped.reason, 0)
    reason, step = stopped.reason.value, amount(stopped.step, "step")
    data = {"run": shown(job.run), "step": stopped.step, "reason": reason}
    text = f"{shown(job.run)}: {reason} after {step}" if writes else ""
    return Report("train", data, lambda: text, exit_code=code, error=error, is_silent=not writes)
