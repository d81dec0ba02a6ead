"""``moecc train``: train a model by a recipe; go on with a run, or fork it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.heartbeat import Progress
from moecc.cli.options import FormatOption, LoadOption, PlanOption
from moecc.support.text import amount

if TYPE_CHECKING:
    from moecc.plan.step import SavedPlan
    from moecc.support.process import Asked
    from moecc.train.events import Reason, Stopped, Trainer, Training, TrainJob
    from moecc.train.trackers import Tracker


@dataclass(frozen=True)
class TrainRequest:
    """The arguments and options of ``moecc train``."""

    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A .toml, or recipe:NAME.", show_default=False),
    ] = None
    out: Annotated[
        str | None, typer.Option("--out", metavar="RUN", help="The folder of the run.")
    ] = None
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on where the run was saved.")
    ] = None
    fork: Annotated[
        str | None,
        typer.Option(
            "--fork", metavar="RUN[@STEP]", help="Go on from a step, under another recipe."
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value: run.steps=500."),
    ] = None
    plan: PlanOption = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and train nothing.")
    ] = False
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="M",
            help="Of a dry run: what is planned, as of moecc plan.",
            autocompletion=complete.machines,
        ),
    ] = None
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Event files in the folder of the run.")
    ] = False
    wandb: Annotated[
        str | None, typer.Option("--wandb", metavar="PROJECT", help="Weights & Biases, too.")
    ] = None
    load: LoadOption = None
    format: FormatOption = Format.human


def train(request: TrainRequest) -> int:
    """Train the model of RECIPE, or go on with a run.

    Everything is checked before the folder is made.  SIGTERM and Ctrl-C finish the step and save;
    then --resume goes on as if nothing had been.  The exit code is 3 where too many steps in a row
    had to be skipped.
    """
    from moecc.cli.console import report, say
    from moecc.support.extras import require
    from moecc.support.process import signals_noted
    from moecc.train.graphs import training_remarks

    if not request.dry_run:
        require("training", ("train",))
    with ExitStack() as opened:
        plan = _saved_plan(request)
        job = opened.enter_context(_job(request, plan))
        planned = [] if plan is None else _check_plan(job, plan, str(request.plan))
        for remark in (*training_remarks(job.graph), *job.batches.remarks, *planned):
            say(f"remark: {remark}")
        if request.dry_run:
            _report_dry_run(job, request)
            return 0
        asked = opened.enter_context(signals_noted())
        running = opened.enter_context(_trainer().train(job))
        stopped = _watch(job, running, asked, request, plan)
    data = {"run": str(job.run), "step": stopped.step, "reason": stopped.reason.value}
    if running.writes:
        text = f"{job.run}: {stopped.reason.value} after {amount(stopped.step, 'step')}"
        report("train", data, lambda: text, request.format)
    return _exit_code(stopped, job)


def _report_dry_run(job: TrainJob, request: TrainRequest) -> None:
    """Report what the run would be. Raises InputError if it does not fit the machine."""
    from moecc.cli.console import report
    from moecc.plan.machines import find_machine
    from moecc.tasks.dry_run import dry_run, dry_run_text

    machine = None if request.machine is None else find_machine(request.machine)
    facts = dry_run(job.recipe, job.graph, job.batches, machine)
    report("train-dry-run", facts, lambda: dry_run_text(facts), request.format)


@contextmanager
def _job(request: TrainRequest, plan: SavedPlan | None) -> Iterator[TrainJob]:
    """Return what is asked for. Raises UsageError where that is not one of the three forms."""
    from pathlib import Path

    from moecc.cli.console import say
    from moecc.errors import UsageError
    from moecc.model.open import registry_with
    from moecc.tasks.train import forked_run, new_run, resumed_run
    from moecc.tasks.train_source import open_source
    from moecc.train.recipe_text import load_recipe

    sets, files = _sets(request, plan), request.load or []
    if request.resume is not None or request.fork is not None:
        registry_with(files)
    if request.resume is not None:
        _check_resumed(request)
        given = None if request.recipe is None else load_recipe(request.recipe, sets)
        yield resumed_run(Path(request.resume), sets, given, files)
        return
    if request.recipe is None or request.out is None:
        raise UsageError(
            "not what moecc train takes",
            expected="RECIPE --out RUN, or --resume RUN, or RECIPE --fork RUN --out RUN2",
        )
    recipe, out = load_recipe(request.recipe, sets), Path(request.out)
    if request.fork is not None:
        yield forked_run(recipe, request.fork, out)
        return
    with open_source(recipe, files) as source:
        for remark in source.remarks:
            say(f"remark: {remark}")
        yield new_run(recipe, source, out)


def _check_resumed(request: TrainRequest) -> None:
    """Raise UsageError for options that begin another run."""
    from moecc.errors import UsageError

    if request.fork is not None:
        raise UsageError("--resume goes on with a run, and --fork begins another from it",
                         hint="leave --fork out, or --resume: one of them")  # fmt: skip
    if request.out is not None:
        raise UsageError("--resume goes on with a run where it is", hint="leave --out out")


def _sets(request: TrainRequest, plan: SavedPlan | None) -> list[str]:
    """Return the values of the recipe that a plan decides, and those that replace them."""
    decided = [] if plan is None else plan.recipe_values(is_new=request.resume is None)
    return [*decided, *(request.set or [])]


def _saved_plan(request: TrainRequest) -> SavedPlan | None:
    """Return the plan that is given. Raises InputError if it is none."""
    from moecc.plan.step import read_plan

    return None if request.plan is None else read_plan(request.plan)


def _check_plan(job: TrainJob, plan: SavedPlan, path: str) -> list[str]:
    """Return remarks on a saved plan. Raises InputError if it is of another model."""
    from moecc.tasks.train_plan import check_plan, plan_remarks

    check_plan(plan, job, path)
    return plan_remarks(plan, job)


def _trainer() -> Trainer:
    from moecc.backend import get_backend
    from moecc.train.events import Trainer

    backend = get_backend("xla")
    assert isinstance(backend, Trainer), "the backend xla trains"
    return backend


def _watch(
    job: TrainJob,
    training: Training,
    asked: Asked,
    request: TrainRequest,
    plan: SavedPlan | None = None,
) -> Stopped:
    """Run a training to its end, and show how it goes."""
    from signal import SIGINT

    from moecc.cli.train_progress import TrainProgress
    from moecc.tasks.train_exports import exported
    from moecc.train.events import Reason, Stopped
    from moecc.train.run import followed
    from moecc.train.trackers import tracked

    def stop() -> Reason | None:
        if asked.signal is None:
            return None
        return Reason.INTERRUPTED if asked.signal is SIGINT else Reason.TERMINATED

    events = followed(job, training, stop)
    if training.writes:
        trackers = _trackers(job, request)
        events = tracked(exported(job, events), trackers, job.recipe.run.log_steps)
    predicted = None if plan is None else plan.tokens_per_second
    quiet = not training.writes
    with TrainProgress(job.recipe.run.steps, quiet=quiet, predicted=predicted) as progress:
        for event in events:
            progress(event)
            if isinstance(event, Stopped):
                return event
    raise AssertionError("a training ends with its end")


def _trackers(job: TrainJob, request: TrainRequest) -> list[Tracker]:
    """Return where metrics go besides the journal."""
    from dataclasses import asdict

    from moecc.formats.run import saved_steps
    from moecc.train.trackers import TensorBoard, WeightsAndBiases

    steps = saved_steps(job.run)
    found: list[Tracker] = []
    if request.tensorboard:
        found.append(TensorBoard(job.run, steps[-1].number if steps else 0))
    if request.wandb is not None:
        found.append(WeightsAndBiases(job.run, request.wandb, asdict(job.recipe)))
    return found


def _exit_code(stopped: Stopped, job: TrainJob) -> int:
    """Return the exit code of a training that ended. Raises CheckError if the guard gave up."""
    from moecc.errors import CheckError
    from moecc.train.events import Reason

    if stopped.reason is Reason.GUARD:
        skips = job.recipe.run.guard.skips
        raise CheckError(
            f"training gave up: {'; '.join(map(str, stopped.faults))}",
            where=f"{job.run}, after step {stopped.step:,}",
            found=f"{skips} skipped steps in a row, twice after the same checkpoint",
            hint="a lower optimizer.rate, or a longer warm-up; metrics.jsonl has the faults of all",
        )
    return {Reason.DONE: 0, Reason.TERMINATED: 143, Reason.INTERRUPTED: 130}[stopped.reason]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "train",
        TrainRequest,
        train,
        "Example: moecc train recipe:upcycle --out run --set model.source=SmolLM2-135M",
        progress=Progress.OWN,
    )
