"""``moecc forecast``: whether and when an upcycled model passes the dense one at equal compute."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil, inf, isfinite, nan
from pathlib import Path
from typing import Annotated

from moecc.analysis import document_mixtures
from moecc.errors import InputError, UsageError
from moecc.families.describe import count_parameters, sequence_flops
from moecc.families.experts import expert_layers
from moecc.formats.run import GRAPH, METRICS, RECIPE, is_run, no_run
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import read_graph
from moecc.ir.unroll import unrolled
from moecc.jobs.command import (
    AnyModelName,
    Force,
    OptionalMachine,
    OutputFile,
    Report,
    Spelling,
    check_writable,
    write_whole,
)
from moecc.jobs.plan import plan_step
from moecc.model.inputs import stated_context
from moecc.model.open import open_model
from moecc.plan.machines import find_machine
from moecc.plan.step import TRAIN_PASSES, StepConfig
from moecc.plan.workload import length_variables, make_batch
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.lazy import graph_objects, np
from moecc.support.page import drawing, render_page
from moecc.support.text import count_text, digits_text, size_text
from moecc.support.untyped import JsonDict
from moecc.train.batches import MOST_EPOCHS
from moecc.train.graphs import planning_graph, train_passes
from moecc.train.recipe import MeshSection, Recipe, RoutingSection, Schedule, Start
from moecc.train.recipe_text import load_recipe, parse_recipe, recipe_file
from moecc.train.run import read_run
from moecc.train.tokens.folder import open_tokens
from moecc.types import Array, Doubles

SAFETY = 2
"""From this many times the crossing on a budget is enough: before, there is little to be won."""

SEQUENCE = 4096
"""Tokens of a sequence without a pilot, unless the model has a shorter context."""

PILOT_STEPS = 300
PILOT_WARMUP = 10
FEWEST_SEEDS = 2
FEWEST_BLOCKS = 5
"""Fewer means of steps than these have no line."""
_SERVED_BYTES = 2
"""Bytes of a parameter in bf16, as models are served."""


@dataclass(frozen=True)
class PilotRuns:
    """The runs of a pilot, read.

    Attributes:
      pilots: both arms of each seed.
      recipe: of the first run.
      sparse: of the first run with experts.
      text_tokens: of the corpora that they train on.
    """

    pilots: tuple[Pilot, ...]
    recipe: Recipe
    sparse: Recipe
    text_tokens: int


def read_pilots(runs: Sequence[str], dense: int, sparse: int) -> PilotRuns:
    """Return the losses of both arms by seed.

    Args:
      runs: folders; a recipe without a pipeline is the dense arm's.
      dense, sparse: parameters of the two models that are asked about.

    Raises:
      InputError: an arm is missing, or the arms do not train on the same batches in the same
        way, or are of other models, or at a rate that falls, or steps were not measured.
    """
    arms: dict[int, dict[bool, Path]] = {}
    recipes: dict[str, Recipe] = {}
    for run in runs:
        path = Path(run)
        if not is_run(path):
            raise no_run(run)
        recipe = parse_recipe(recipe_file(path / RECIPE), str(path / RECIPE), folder=path)
        is_dense = not recipe.model.pipeline
        if recipe.model.start is Start.RANDOM:
            raise InputError("the pilot begins from random parameters", where=run,
                             expected='model.start = "source"')  # fmt: skip
        count = count_parameters(read_graph(str(path / GRAPH))).total
        expected = dense if is_dense else sparse
        if count != expected:
            raise InputError(
                f"the pilot's {'dense' if is_dense else 'sparse'} arm is another model", where=run,
                expected=f"{expected:,} parameters", found=f"{count:,}",
                hint=None if is_dense else f"--pipeline '{recipe.model.pipeline}' is the run's",
            )  # fmt: skip
        if is_dense in arms.setdefault(recipe.data.seed, {}):
            raise InputError(
                f"two runs are the same arm of data.seed = {recipe.data.seed}", where=run,
                hint="the arms of a seed are one run without model.pipeline and one with it",
            )  # fmt: skip
        arms[recipe.data.seed][is_dense] = path
        recipes[run] = recipe
    alone = [str(path) for pair in arms.values() if len(pair) < 2 for path in pair.values()]
    if alone:
        raise InputError(
            "an arm of the pilot is alone", where=alone[0],
            expected="a dense and a sparse run with the same data.seed",
        )  # fmt: skip
    _check_alike(recipes)
    for seed in arms:
        _check_alike({run: r for run, r in recipes.items() if r.data.seed == seed}, of_seed=True)
    first = next(iter(recipes.values()))
    steps = min(map(_constant_steps, recipes.values()))
    pilots = tuple(Pilot(_losses(pair[True], steps), _losses(pair[False], steps))
                   for pair in arms.values())  # fmt: skip
    shortest = min(len(x) for pilot in pilots for x in (pilot.dense, pilot.sparse))
    fewest = first.optimizer.warmup + FEWEST_BLOCKS * BLOCK_STEPS
    if shortest < fewest:
        raise InputError(
            "the pilot is too short", where="run.steps",
            expected=f"at least {fewest} steps: {first.optimizer.warmup} of warm-up, which are "
            f"left out, and {FEWEST_BLOCKS * BLOCK_STEPS} at a constant rate", found=str(shortest),
        )  # fmt: skip
    pilots = tuple(Pilot(p.dense[:shortest], p.sparse[:shortest]) for p in pilots)
    folders = [open_tokens(corpus.tokens) for corpus in first.data.train]
    sparse_recipe = next(r for r in recipes.values() if r.model.pipeline)
    return PilotRuns(pilots, first, sparse_recipe, sum(x.facts.tokens for x in folders))


def _check_alike(recipes: Mapping[str, Recipe], of_seed: bool = False) -> None:
    """Raise InputError unless runs agree in what a difference of their losses must not be due to.

    Seeds may begin from dense models of their own; both arms of a seed begin from the same one.
    """
    facts = {
        run: {
            **{f"data.{key}": value for key, value in asdict(r.data).items()
               if key not in ("evaluate", "evaluate_batches", "seed")},
            **{f"optimizer.{key}": value for key, value in asdict(r.optimizer).items()
               if key not in ("schedule", "decay_steps", "end_factor", "groups")},
            "run.dtype": r.run.dtype, "run.weight_dtype": r.run.weight_dtype,
            **({"model.source": r.model.source} if of_seed else {}),
        }
        for run, r in recipes.items()
    }  # fmt: skip
    first, expected = next(iter(facts.items()))
    for run, values in facts.items():
        for name, value in values.items():
            if value != expected[name]:
                raise InputError(
                    f"the runs of the pilot differ in {name}", where=run,
                    expected=f"{expected[name]}, as {first}", found=str(value),
                )  # fmt: skip


def _constant_steps(recipe: Recipe) -> int:
    """Return the steps of a run before its rate falls. Raises InputError if it falls at once."""
    section = recipe.optimizer
    if section.schedule not in (Schedule.CONSTANT, Schedule.WSD):
        raise InputError(
            "a pilot needs a constant rate", where="optimizer.schedule",
            expected="constant or wsd", found=section.schedule.value,
        )  # fmt: skip
    return recipe.run.steps - section.decay_steps


def _losses(run: Path, steps: int) -> Doubles:
    """Return the cross entropy of the first steps of a run; those not measured lie between."""
    key = "loss.cross_entropy"
    measured = [line for line in read_run(run).stepped if line.get(key) is not None]
    if not measured:
        raise InputError(f"the run measured no {key}", where=run / METRICS)
    at = np.array([0, *(line["step"] for line in measured if line["step"] <= steps)])
    for before, after in pairwise(at.tolist()):
        # A mean of steps of which none was measured is no observation.
        if not 0 < after - before <= BLOCK_STEPS:
            raise InputError(
                f"the run measured no {key} in {BLOCK_STEPS} steps", where=run / METRICS,
                expected=f"rising steps, at most {BLOCK_STEPS} apart",
                found=f"step {after} after step {before}",
                hint=f"run.log_steps of at most {BLOCK_STEPS}, and no fork of another run",
            )  # fmt: skip
    values = [line[key] for line in measured[: len(at) - 1]]
    losses: Doubles = np.interp(np.arange(1, int(at[-1]) + 1), at[1:], values)
    return losses


def refusals(
    crossing: Crossing,
    steps: int,
    pilots: int,
    budget_steps: float,
    text_steps: float,
    step_tokens: int = 1,
) -> Iterator[tuple[str, str]]:
    """Yield why the crossing is no reason to upcycle, and what would change that."""
    if pilots < FEWEST_SEEDS:
        yield "the pilot has one seed", "both arms of another data.seed"
        return
    if crossing.fall_high <= 0:
        yield (
            "the loss of the pilot's dense arm does not fall",
            "a lower optimizer.rate for both arms, or a longer warm-up",
        )
        return
    if crossing.slope_low <= 0:
        yield (
            "the pilot's gain does not grow: its interval holds 0",
            f"more seeds, or a pilot of {2 * steps:,} steps",
        )
        return
    if not isfinite(crossing.steps):
        yield (
            "the dense model falls faster for each unit of compute",
            "a sparse step that costs less: half-experts (granularity=2), or faster kernels",
        )
        return
    if crossing.high > FARTHEST * steps:
        yield (
            f"the crossing may be beyond {FARTHEST} times the pilot, where its line is unknown",
            f"a pilot of {ceil(min(crossing.high, 1e7) / FARTHEST):,} steps",
        )
    if budget_steps < SAFETY * crossing.steps:
        yield (
            f"the budget is {budget_steps / crossing.steps:.2f} times the crossing",
            f"a budget of {SAFETY} times the crossing, {ceil(SAFETY * crossing.steps):,} steps",
        )
    if SAFETY * crossing.steps > MOST_EPOCHS * text_steps:
        enough = SAFETY * crossing.steps
        yield (
            f"by twice the crossing ({ceil(enough):,} steps) the text would be read "
            f"{enough / text_steps:.1f} times, at most {MOST_EPOCHS}",
            f"at least {ceil(enough * step_tokens / MOST_EPOCHS):,} tokens of text (there are "
            f"{round(text_steps * step_tokens):,})",
        )


def forecast(
    model: AnyModelName,
    *,
    tokens: Annotated[float, Spelling("N", low=1, is_count=True)],
    pipeline: Annotated[str, Spelling("PIPELINE", "p", complete="pipelines")] = "",
    pilot: Annotated[Sequence[str], Spelling("RUN")] = (),
    budget: Annotated[str | None, Spelling("FLOPS|HOURSh")] = None,
    machine: OptionalMachine = None,
    serving: Annotated[str | None, Spelling("M", complete="machines")] = None,
    price: Annotated[float | None, Spelling("X", low=0)] = None,
    html: OutputFile = None,
    force: Force = False,
) -> Report:
    """Forecast whether upcycling a dense model is worth it.

    A pilot is both arms of two seeds or more, trained on the same batches at a constant rate: the
    dense model, and the model that the pipeline makes of it. From it follow the step from which on
    the sparse model is below the dense one at equal compute, its interval, and a yes, or a no with
    its reasons. Without a pilot the answer is no, with what a pilot would cost.

    Args:
      tokens: Number of tokens that the dense model was trained on (not those of the run to come).
      pipeline: Passes that make the sparse model (default: those of recipe:upcycle).
      pilot: Run of a pilot; may be repeated.
      budget: Compute that is there to train with: FLOPs, or device-hours of --machine as 500h.
      serving: Machine that is to serve the model, as --machine.
      price: Price of a device-hour.
      html: File to write a page with both curves to.

    Example:
      moecc forecast preset:smollm2-135m --tokens 2e12 --machine gpu:h100:8
    """
    if html is not None:
        check_writable(html, force=force)
    if price is not None and machine is None:
        raise UsageError("--price has no device-hours to price", hint="state the --machine")
    limit = None if budget is None else _budget(budget, machine)
    passes = Pipeline.parse(pipeline or load_recipe("recipe:upcycle").model.pipeline)
    with open_model(model, config_alone=True) as opened:
        dense, sparse = opened.graph, clone(opened.graph)
    if "tokens" not in dense.inputs:
        raise InputError(
            "a forecast is of a model that moecc train trains", where=model,
            expected="an input named tokens", found=", ".join(dense.inputs),
        )  # fmt: skip
    if not pipeline and expert_layers(dense):
        raise InputError(
            "the model has experts already, and recipe:upcycle begins from a dense one",
            where=model, hint="--pipeline 'grow{times=2}' forecasts more experts",
        )  # fmt: skip
    run_pipeline(sparse, passes)
    dense, sparse = unrolled(dense), unrolled(sparse)
    counts = [count_parameters(graph).total for graph in (dense, sparse)]
    if counts[1] <= counts[0]:
        raise UsageError(
            "--pipeline adds no experts", expected=f"more than {counts[0]:,} parameters",
            found=f"{counts[1]:,} after {passes}",
        )  # fmt: skip
    runs = read_pilots(pilot, *counts) if pilot else None
    facts, draw = _forecast(model, str(passes), dense, sparse, runs, tokens, limit, machine, price)
    if serving is not None and (too_large := _too_large(facts["served_bytes"], serving)):
        facts = {**facts, "worth_it": False, "reasons": [*facts["reasons"], too_large]}
    if price is not None and facts["device_hours"] is not None:
        facts["price"] = price * facts["device_hours"]
    if html is not None:
        write_whole(html, _page(facts, draw).encode(), force=force)
    return Report("forecast", facts, lambda: "\n".join(_lines(facts)))


def _forecast(
    model: str,
    pipeline: str,
    dense: Graph,
    sparse: Graph,
    runs: PilotRuns | None,
    tokens: float,
    budget: tuple[float, bool] | None,
    machine: str | None,
    price: float | None,
) -> tuple[JsonDict, Callable[[], JsonDict] | None]:
    """Return the report as JSON values, and what draws the curves of a pilot."""
    context = stated_context(dense)
    seq = min(SEQUENCE, context or SEQUENCE) if runs is None else runs.recipe.data.seq
    batch = None if runs is None else seq * runs.recipe.data.batch
    if runs is None:
        recipes = [load_recipe(f"recipe:{name}") for name in ("continue-dense", "upcycle")]
        is_mixing = any(document_mixtures(dense, seq))
        recipes = [replace(r, data=replace(r.data, packing=not is_mixing)) for r in recipes]
    else:
        recipes = [replace(runs.recipe, routing=RoutingSection()), runs.sparse]
    before, after = (
        _cost(model, graph, recipe, seq, batch, machine)
        for graph, recipe in zip((dense, sparse), recipes, strict=True)
    )
    ratio = after["flops_per_token"] / before["flops_per_token"]
    if before["device_hours"] and after["device_hours"]:
        # The best plan of a tiny dense model may be worse than its own step inside of the sparse
        # one's, whose meshes repeat the work of attention on every device.
        ratio = max(after["device_hours"] / before["device_hours"], min(ratio, 1.0))
    facts: JsonDict = {
        "model": model, "pipeline": pipeline, "machine": machine, "tokens_behind": tokens,
        "sequence": seq,
        "dense": before, "sparse": after, "compute_ratio": ratio,
        "served_bytes": after["parameters"] * _SERVED_BYTES, "crossing": None, "flops": None,
        "device_hours": None, "price": None, "pilot": None, "commands": [],
    }  # fmt: skip
    if runs is None:
        needed = f"{FEWEST_SEEDS} seeds of both arms, {PILOT_STEPS} steps each"
        if before["device_hours"] is not None and after["device_hours"] is not None:
            hours = FEWEST_SEEDS * PILOT_STEPS * (before["device_hours"] + after["device_hours"])
            needed += f", with {before['step_tokens']:,} tokens a step {hours:.3g} device-hours"
            needed += f" of {machine}"
            needed += "" if price is None else f", which cost {digits_text(price * hours)}"
        facts["commands"] = list(_pilot_commands(facts, not is_mixing))
        return {**facts, **_answer([("there is no pilot", needed)])}, None
    assert batch is not None, "a pilot has batches"
    behind = tokens / batch
    crossing = crossing_of(runs.pilots, behind, ratio, runs.recipe.optimizer.warmup)
    steps = len(runs.pilots[0].dense)
    step_flops = TRAIN_PASSES * after["flops_per_token"] * batch
    budget_steps = inf
    if budget is not None:
        amount, is_hours = budget
        a_step = after["device_hours"] if is_hours else float(step_flops)
        assert a_step is not None, "device-hours come with a machine"
        budget_steps = amount / a_step
    text_steps = runs.text_tokens / batch
    reasons = list(refusals(crossing, steps, len(runs.pilots), budget_steps, text_steps, batch))
    crossing_steps = crossing.steps if isfinite(crossing.steps) else None
    facts |= {
        "pilot": {
            "seeds": len(runs.pilots), "steps": steps, "tokens_per_step": batch,
            "rate": runs.recipe.optimizer.rate,
            "gain_at_start": crossing.start, "gain_per_step": crossing.slope,
            "dense_fall": crossing.fall, "text_tokens": runs.text_tokens,
        },
        "crossing": {
            name: value * batch if isfinite(value) else None
            for name, value in (("tokens", crossing.steps), ("low", crossing.low),
                                ("high", crossing.high))
        },
        "flops": None if crossing_steps is None else crossing_steps * step_flops,
        "device_hours": None if crossing_steps is None or after["device_hours"] is None
        else crossing_steps * after["device_hours"],
    }  # fmt: skip
    return {**facts, **_answer(reasons)}, partial(_drawing, crossing, runs, behind, ratio)


def _pilot_commands(facts: JsonDict, packing: bool) -> Iterator[str]:
    """Yield the commands of a pilot, and the forecast from it."""
    values = {
        "optimizer.schedule": "constant", "optimizer.warmup": PILOT_WARMUP,
        "run.steps": PILOT_STEPS, "data.seq": facts["sequence"],
    }  # fmt: skip
    if not packing:
        values["data.packing"] = "false"
    if facts["machine"] is not None:
        values["data.batch"] = facts["dense"]["step_tokens"] // facts["sequence"]
        values["run.dtype"] = StepConfig().dtype
    runs = []
    for seed in range(FEWEST_SEEDS):
        for arm, recipe in (("dense", "continue-dense"), ("sparse", "upcycle")):
            runs.append(f"pilot-{arm}-{seed}")
            seeded = values | {"data.seed": seed}
            yield _train_command(facts, f"recipe:{recipe}", runs[-1], seeded)
    machine = () if facts["machine"] is None else ("--machine", facts["machine"])
    yield shlex.join(
        ("moecc", "forecast", facts["model"], "--tokens", f"{facts['tokens_behind']:g}",
         "-p", facts["pipeline"], *machine, *(word for run in runs for word in ("--pilot", run)))
    )  # fmt: skip


def _train_command(facts: JsonDict, recipe: str, out: str, values: JsonDict) -> str:
    """Return the training of an arm; texts, and the weights of a preset, are to be filled in."""
    source = facts["model"]
    values = {
        "model.source": "FOLDER" if source.startswith("preset:") else source,
        "data.train.0.tokens": "TRAIN", "data.evaluate.0.tokens": "HELDOUT", **values,
    }  # fmt: skip
    if recipe == "recipe:upcycle":
        values["model.pipeline"] = facts["pipeline"]
    sets = (word for key, value in values.items() for word in ("--set", f"{key}={value}"))
    return shlex.join(("moecc", "train", recipe, "--out", out, *sets))


def _too_large(served_bytes: int, serving: str) -> JsonDict | None:
    """Return the reason where the memory of a machine is below the weights of the sparse model."""
    device = find_machine(serving)
    room = device.usable_bytes * device.devices
    if served_bytes <= room:
        return None
    return {
        "reason": f"the sparse model has {size_text(served_bytes)}, {serving} {size_text(room)}",
        "changes_it": "fewer experts, every other layer, or quantised weights",
    }


def _answer(reasons: Sequence[tuple[str, str]]) -> JsonDict:
    return {
        "worth_it": not reasons,
        "reasons": [{"reason": why, "changes_it": change} for why, change in reasons],
    }


def _cost(
    model: str, graph: Graph, recipe: Recipe, seq: int, batch: int | None, machine: str | None
) -> JsonDict:
    """Return the stored parameters of an arm, and what a step of its recipe costs, as planned."""
    flops = sequence_flops(graph, dict.fromkeys(length_variables(graph), seq)).per_token
    hours, tokens = None, None
    if machine is not None:
        config = StepConfig(batch_tokens=batch, sequence=str(seq))
        devices = find_machine(machine).devices
        if batch is not None and (batch // seq) % devices:
            raise InputError(
                "the pilot's batch does not divide among the devices", where=machine,
                expected=f"a multiple of {devices} sequences", found=str(batch // seq),
                hint="state a machine with fewer devices, or run a pilot with a larger data.batch",
            )  # fmt: skip
        sequences = make_batch(graph, devices, batch, config.lengths).sequences
        data = replace(recipe.data, batch=sequences, seq=seq)
        run = replace(recipe.run, micro_batches=1)
        recipe = replace(recipe, data=data, mesh=MeshSection(), run=run)
        step = planning_graph(graph, train_passes(graph, recipe))
        plan = plan_step(step, model, machine, config)[0]
        hours = plan["best"]["seconds"] * plan["machine"]["devices"] / 3600
        tokens = plan["batch"]["tokens"]
    return {
        "parameters": count_parameters(graph).total, "flops_per_token": flops,
        "device_hours": hours, "step_tokens": tokens,
    }  # fmt: skip


def _budget(text: str, machine: str | None) -> tuple[float, bool]:
    """Return the FLOPs or device-hours of ``--budget``, and whether they are hours."""
    try:
        amount = float(text.removesuffix("h"))
    except ValueError:
        amount = nan
    if not 0 < amount < inf:
        raise UsageError("--budget is no amount", expected="1e20, or 500h", found=text)
    is_hours = text.endswith("h")
    if is_hours and machine is None:
        raise UsageError("--budget in device-hours needs --machine", found=text)
    return amount, is_hours


def _lines(facts: JsonDict) -> Iterator[str]:
    dense, sparse, crossing = facts["dense"], facts["sparse"], facts["crossing"]
    yield f"{facts['model']}: {'worth it' if facts['worth_it'] else 'no'}"
    yield (
        f"  sparse      {count_text(dense['parameters'])} to {count_text(sparse['parameters'])} "
        f"parameters, {size_text(facts['served_bytes'])} to serve; {facts['compute_ratio']:.3f} "
        f"times the {'FLOPs' if dense['device_hours'] is None else 'device-hours'} of a dense step"
    )
    if crossing is not None:
        mean, low, high = ("never" if crossing[n] is None else count_text(round(crossing[n]))
                           for n in ("tokens", "low", "high"))  # fmt: skip
        after = "" if mean == "never" else " tokens after the switch"
        yield f"  crossing    {mean}{after} ({low} to {high})"
    if facts["flops"] is not None:
        hours = facts["device_hours"]
        yield f"  cost        {facts['flops']:.3g} FLOPs to the crossing" + (
            "" if hours is None else f", {hours:,.3g} device-hours of {facts['machine']}"
        ) + ("" if facts["price"] is None else f", {digits_text(facts['price'])}")  # fmt: skip
    if facts["worth_it"]:
        pilot, shipped = facts["pilot"], load_recipe("recipe:upcycle").optimizer
        steps = ceil(SAFETY * crossing["tokens"] / pilot["tokens_per_step"])
        values = {
            "run.steps": max(steps, shipped.warmup + shipped.decay_steps),
            "data.batch": pilot["tokens_per_step"] // facts["sequence"],
            "data.seq": facts["sequence"], "optimizer.rate": pilot["rate"],
        }  # fmt: skip
        command = _train_command(facts, "recipe:upcycle", "RUN", values)
        yield f"  recipe      {values['run.steps']:,} steps or more: {command}"
    for reason in facts["reasons"]:
        yield f"  no          {reason['reason']}"
        yield f"  instead     {reason['changes_it']}"
    for command in facts["commands"]:
        yield f"  pilot       {command}"


def _page(facts: JsonDict, draw: Callable[[], JsonDict] | None) -> str:
    """Return a page with the lines of the report and the curves. Raises MachineError."""
    rows = [line.strip().split(None, 1) for line in list(_lines(facts))[1:]]
    title = f"{facts['model']}: {'worth it' if facts['worth_it'] else 'not shown to be worth it'}"
    sections = [] if draw is None else [("Both arms at equal compute", [draw()])]
    return render_page(
        "runs.html", title, figures=True, fact_heads=["", "forecast"],
        facts=[row for row in rows if row[0] not in ("no", "instead")],
        alarms_title="Why not",
        alarms=[f"{x['reason']}; {x['changes_it']} would change that" for x in facts["reasons"]],
        sections=sections, specialised=[],
    )  # fmt: skip


def _drawing(line: Crossing, runs: PilotRuns, behind: float, ratio: float) -> JsonDict:
    steps = len(runs.pilots[0].dense)
    end = min(max(2 * line.steps, 2 * steps), FARTHEST * steps)
    at = np.linspace(1, end, 200)
    arms = {
        "dense, at as much compute": line.dense(behind + ratio * at),
        "sparse": line.dense(behind + at) - line.gain(at),
    }
    figure = graph_objects.Figure(
        [graph_objects.Scatter(x=at, y=y, name=name, mode="lines") for name, y in arms.items()]
    )
    measured = np.mean([p.sparse for p in runs.pilots], axis=0)
    figure.add_scatter(x=np.arange(1, steps + 1), y=measured, name="sparse, measured",
                       mode="lines", opacity=0.3)  # fmt: skip
    if isfinite(line.steps) and line.steps <= end:
        figure.add_vline(x=line.steps, line_dash="dot", annotation_text="crossing")
    return drawing(figure, "Loss in nats a token", 420, "steps of the sparse model")


# Both arms of a pilot train on the same batches at a constant rate, so that the noise of batches
# is in both and leaves their difference.  The gain of the sparse arm begins below zero, as routers
# and balance losses are new, and is soon made up in part; after that it grows about linearly in
# steps within some times the pilot.  The dense arm's loss falls with the logarithm of all its
# tokens.  At equal compute the dense arm is allowed more steps: the models cross where the gain is
# what those steps are worth.

BLOCK_STEPS = 10
"""Steps whose mean is one observation: differences of neighbouring steps are hardly related."""

FARTHEST = 8
"""Times the steps of the pilot beyond which no crossing was ever measured (docs/worth.md)."""

_EARLY = 1 / 6
"""The part of a pilot, after its warm-up, of whose gain the line is not: an arm that drops tokens
makes up most of what the switch cost it there, and little after it."""

_DRAWS = 500


@dataclass(frozen=True)
class Pilot:
    """Both arms of one seed, which train on the same batches.

    Attributes:
      dense, sparse: cross entropy of each step, in nats a token, ``f64[step]``.
    """

    dense: Doubles
    sparse: Doubles


@dataclass(frozen=True)
class Crossing:
    """Steps after which the sparse model is below the dense one at equal compute.

    Attributes:
      steps: the estimate; infinite for never.
      start, slope: the line of the gain, at the switch and with each step, in nats a token.
      level, fall: the dense loss is `level` less `fall` times the logarithm of all steps.
      low, high: the interval of 95 % of the steps, over seeds and blocks of steps.
      slope_low: the lower end of that of the slope.
      fall_high: the upper end of that of the fall.
    """

    steps: float
    start: float
    slope: float
    level: float
    fall: float
    low: float = 0.0
    high: float = inf
    slope_low: float = 0.0
    fall_high: float = 0.0

    def dense(self, steps: Doubles) -> Doubles:
        """Return the loss of the dense model after so many steps in all."""
        return self.level - self.fall * np.log(steps)

    def gain(self, steps: Doubles) -> Doubles:
        """Return by how much the sparse model is lower so many steps after the switch."""
        return self.start + self.slope * steps


def crossing_of(
    pilots: Sequence[Pilot], behind_steps: float, ratio: float, warmup: int
) -> Crossing:
    """Return where the arms cross.

    Args:
      pilots: of each seed, as many steps of both arms.
      behind_steps: the dense model's tokens before the switch, in steps of the pilot.
      ratio: the compute of a sparse step over that of a dense one.
      warmup: the first steps, in which the rate rises: they are left out.
    """
    gains = np.stack([_blocks(p.dense - p.sparse, warmup) for p in pilots])
    dense = np.stack([_blocks(p.dense, warmup) for p in pilots])
    at: Doubles = warmup + BLOCK_STEPS * (np.arange(gains.shape[1], dtype=np.float64) + 0.5)

    rng = np.random.default_rng(0)
    seeds, blocks = np.arange(len(pilots)), np.arange(len(at))
    later = blocks[round(_EARLY * len(blocks)) :]
    seed_rows, block_rows, later_rows = (_drawn(n, rng) for n in (seeds, blocks, later))
    drawn_dense = dense[seed_rows[:, :, None], block_rows[:, None]].mean(1)
    drawn_gains = gains[seed_rows[:, :, None], later_rows[:, None]].mean(1)
    level, rise = _least_squares(np.log(behind_steps + at[block_rows]), drawn_dense)
    start, slope = _least_squares(at[later_rows], drawn_gains)
    roots = _roots(start, slope, np.maximum(-rise, 0.0), behind_steps, ratio)
    edge = _DRAWS // 40
    ends, slopes, falls = (np.sort(drawn[1:]) for drawn in (roots, slope, -rise))
    fit = (roots[0], start[0], slope[0], level[0], -rise[0])
    interval = (ends[edge], ends[-edge - 1], slopes[edge], falls[-edge - 1])
    return Crossing(*map(float, (*fit, *interval)))


def _drawn(numbers: Array, rng: np.random.Generator) -> Array:
    """Return the numbers, then as many drawn from them, a row a draw."""
    return np.vstack([numbers, rng.choice(numbers, (_DRAWS, len(numbers)))])


def _blocks(values: Doubles, warmup: int) -> Doubles:
    count = (len(values) - warmup) // BLOCK_STEPS
    inside = values[warmup : warmup + count * BLOCK_STEPS]
    means: Doubles = inside.reshape(count, BLOCK_STEPS).mean(1)
    return means


def _least_squares(x: Doubles, y: Doubles) -> tuple[Doubles, Doubles]:
    """Return intercepts and slopes of the lines of least squares through the points of each row."""
    spread = x - x.mean(1, keepdims=True)
    slopes: Doubles = (spread * y).sum(1) / np.maximum((spread**2).sum(1), 1e-30)
    return y.mean(1) - slopes * x.mean(1), slopes


def _roots(start: Doubles, slope: Doubles, fall: Doubles, behind: float, ratio: float) -> Doubles:
    """Return the steps from which on gains exceed what the dense arm's further steps bring."""
    steps = np.geomspace(1, 1e8, 4000)
    further = np.log((behind + ratio * steps) / (behind + steps))
    is_below = ~(start[:, None] + slope[:, None] * steps > fall[:, None] * further)
    after_last = len(steps) - np.argmax(is_below[:, ::-1], axis=1)
    roots: Doubles = np.append(steps, inf)[np.where(is_below.any(1), after_last, 0)]
    return roots
