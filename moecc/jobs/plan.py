"""``moecc plan``: predict the cost of a model on a machine, and find the best mesh."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated

from moecc.analysis import is_trainable, reads_tokens
from moecc.errors import InputError, MoeccError, Problem, UsageError, raise_problems
from moecc.families import build
from moecc.families.describe import describe
from moecc.ir.graph import Graph
from moecc.ir.ops.slots import SlotsOp, assigner
from moecc.ir.structure import clone, without_opaque
from moecc.ir.traits import RowMove
from moecc.jobs.command import (
    AnyModelName,
    Force,
    Load,
    MachineName,
    OutputFile,
    PipelineText,
    Report,
    Spelling,
    check_writable,
    read_pipeline,
    write_whole,
)
from moecc.plan.explore import PlannedStep, explore
from moecc.plan.machines import Machine, find_machine
from moecc.plan.report import plan_json, plan_text, run_json, searched_json
from moecc.plan.search import search, seconds_text
from moecc.plan.step import StepConfig, as_option, option_name, saved_text
from moecc.plan.sweeps import (
    DROPLESS,
    Factor,
    Point,
    Sweep,
    failed_point,
    parse_sweep,
    planned_point,
    sweep_json,
    sweep_text,
)
from moecc.plan.workload import Workload, make_batch, planned_graph, workload
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.rules import read_layouts, remark_on_groups
from moecc.support.console import say
from moecc.support.process import gc_paused
from moecc.support.untyped import Json, JsonDict

if TYPE_CHECKING:
    from moecc.families.config import ModelConfig


# Plan a step of a model on a machine: what `moecc plan` and ``Model.plan`` call.


def check_step(machine: str, config: StepConfig) -> None:
    """Check the settings of a step before a model is opened. Raises: UsageError, InputError."""
    config.check()
    find_machine(machine)


@gc_paused()
def plan_step(
    graph: Graph, name: str, machine: str, config: StepConfig, explored: bool = False
) -> tuple[JsonDict, list[JsonDict]]:
    """Return the plan of a step of `graph` as JSON values, and all strategies that fit.

    Args:
      graph: of the model, without any pass of the step.
      name: of the model, in the report.
      machine: by name or file.
      config: the settings of the step.
      explored: whether the report has further ideas with their price.

    Raises:
      UsageError: the machine or a setting cannot be parsed.
      InputError: the model is invalid, or nothing fits.
    """
    check_step(machine, config)
    device, graph = find_machine(machine), planned_graph(graph, config.train)
    of_batch = cache(partial(workload, graph))

    def work_on(target: Machine, parts: int) -> Workload:
        devices = target.devices
        return of_batch(make_batch(graph, devices, config.batch_tokens, config.lengths, parts))

    work = work_on(device, config.micro_batches)
    ranking = search(work, device, config, work_on)
    situation = PlannedStep(work, device, config, ranking, work_on, of_batch)
    ideas = explore(situation) if explored else ()
    return plan_json(name, work, device, config, ranking, ideas), searched_json(ranking, work)


# Plan one model with other numbers of experts, choices and capacities: ``moecc plan --sweep``.

_MAKES = "-p 'upcycle{experts=8 top-k=2}' makes some"


@dataclass(frozen=True)
class Swept:
    """The common settings of the models of a sweep.

    Attributes:
      graph: the source's, before any pass.
      passes: what runs over each.
      name: in the report.
      machine: where they are planned.
      step: what is asked of each plan.
      context: of the passes; None for that of a model without weights.
    """

    graph: Graph
    passes: Pipeline
    name: str
    machine: str
    step: StepConfig
    context: Context | None = None


def plan_sweep(swept: Swept, sweep: Sweep) -> JsonDict:
    """Return the plans of all models of a sweep, as JSON values.

    A model that cannot be made, or does not fit, is a point with a problem.

    Raises:
      UsageError: the machine or an option is wrong.
      InputError: no model can be made and fits: the first one's problem.
    """
    check_step(swept.machine, swept.step)
    shared: JsonDict | None = None
    points: list[JsonDict] = []
    first: MoeccError | None = None
    graphs: dict[Point, Graph | MoeccError] = {}
    for point in sweep.points():
        try:
            graph = _graph(swept, point, graphs)
            shared = plan_step(graph, swept.name, swept.machine, swept.step)[0]
            active = describe(graph).parameters.active
            points.append(planned_point(_filled(point, _has(graph)), shared, active))
        except (InputError, UsageError) as error:
            first = first or error
            points.append(failed_point(point, _why(error.problems[0])))
    if shared is None:
        assert first is not None, "a sweep has points"
        raise first
    return sweep_json(sweep, shared, points)


def _filled(asked: Point, has: Point) -> Point:
    """Return what was asked of a point, and of what was not, what its graph has."""
    return Point(
        asked.experts or has.experts, asked.top_k or has.top_k,
        asked.capacity_factor or has.capacity_factor,
    )  # fmt: skip


def _why(problem: Problem) -> str:
    """Return a problem in a line."""
    text = f"{problem.where}: {problem.message}" if problem.where else problem.message
    return f"{text}: {problem.found}" if problem.found else text


def _graph(swept: Swept, point: Point, graphs: dict[Point, Graph | MoeccError]) -> Graph:
    """Return the model of a point; capacities of the same experts share what is made before."""
    # A plan of one model imports nothing of training.
    from moecc.train.graphs import run_passes

    counts = replace(point, capacity_factor=None)
    if counts not in graphs:
        try:
            graphs[counts] = without_opaque(_with_counts(swept, counts))
        except (InputError, UsageError) as error:
            graphs[counts] = error
    planned = graphs[counts]
    if isinstance(planned, MoeccError):
        raise planned
    if point.capacity_factor is None:
        return planned
    graph = clone(planned)
    if _has(graph).capacity_factor is None:
        raise InputError("the model has no experts that take a capacity", hint=_MAKES)
    mode = "train" if swept.step.step == "train" else "eval"
    run_passes(graph, f"specialize{{mode={mode} {_bound(point.capacity_factor)}}}")
    return graph


def _bound(factor: Factor) -> str:
    return "dropless=true" if factor == DROPLESS else f"capacity-factor={factor}"


def _with_counts(swept: Swept, counts: Point) -> Graph:
    """Return the model with other numbers of experts and choices, after all passes."""
    changes = {n: v for n in ("experts", "top_k") if (v := getattr(counts, n)) is not None}
    graph, passes = clone(swept.graph), swept.passes
    if changes:
        makers = (
            at
            for at, item in enumerate(passes)
            if {"experts", "top_k"} <= {f.name for f in fields(item)}
        )
        at = max(makers, default=None)
        if at is None:
            graph = _of_config(graph, changes)
        else:
            items = list(passes)
            items[at] = replace(items[at], **changes)
            passes = Pipeline(tuple(items))
    run_pipeline(graph, passes, context=swept.context)
    return graph


_OF_CONFIGS = {"experts": "num_experts", "top_k": "experts_per_token"}


def _of_config(graph: Graph, changes: Mapping[str, int]) -> Graph:
    """Return the graph of a source's config with other numbers of experts and choices.

    Raises:
      InputError: the config has no such numbers, or the graph is not what a config makes.
    """
    from moecc.families.registry import parse_config

    if not graph.stated_config:
        raise InputError("the graph has no config in which experts could be counted", hint=_MAKES)
    config = parse_config(graph.stated_config, "attr config")
    raise_problems(_cannot(config, changes))
    new: JsonDict = {_OF_CONFIGS[name]: value for name, value in changes.items()}
    changed = replace(config, **new)
    raise_problems(replace(problem, where=None, hint=None) for problem in changed.checks())
    return build(changed)


def _cannot(config: ModelConfig, changes: Mapping[str, int]) -> Iterator[Problem]:
    """Yield the numbers that a family does not have, or has fixed."""
    has = {f.name for f in fields(config)}
    for name in changes:
        if _OF_CONFIGS["experts"] not in has:
            yield Problem(f"{config.model_type} has no experts", hint=_MAKES)
            return
        if _OF_CONFIGS[name] not in has:
            yield Problem(f"{config.model_type} does not say how many experts a token takes")


def _has(graph: Graph) -> Point:
    """Return the experts, choices and capacity factor of a graph: of its layers the largest."""
    layers = describe(graph).expert_layers
    sent = (node for node in graph if node.op.moves is RowMove.TO_SLOTS)
    slots = [SlotsOp.of_node(assigner(node.operands[2])) for node in sent]
    if not layers or not slots:
        return Point()
    ragged = any(attrs.slots == "ragged" for attrs in slots)
    factor: Factor = DROPLESS if ragged else max(attrs.capacity_factor for attrs in slots)
    return Point(max(x.experts for x in layers), max(x.top_k for x in layers), factor)


def plan(
    model: AnyModelName,
    *,
    machine: MachineName,
    pipeline: PipelineText = "",
    load: Load = (),
    config: StepConfig = StepConfig(),
    tokens: Annotated[float | None, Spelling("N", low=1, is_count=True)] = None,
    price: Annotated[float | None, Spelling("P", low=0)] = None,
    explore: bool = False,
    sweep: Annotated[Sequence[str], Spelling("AXIS=N,…")] = (),
    html: OutputFile = None,
    save: OutputFile = None,
    force: Force = False,
) -> Report:
    """Predict memory, time and traffic, and find a mesh.

    Nothing is read but headers, and nothing is compiled or run. docs/planning.md lists the parts of
    a step that are counted.

    Args:
      tokens: Number of tokens of a whole run, 100e9 or 100B: print its days and device hours.
      price: Price of a device hour, in any currency: print the cost of the run, too.
      explore: Price other settings, meshes and machines that one would try, with reasons.
      sweep: Values to plan with, each of them: experts=8,16 top-k=1,2
        capacity-factor=1.25,dropless; may be repeated.
      html: File to write a page of the plan to.
      save: File to write the plan to, which compile, train and launch template read.

    Example:
      moecc plan preset:mixtral-8x7b --machine tpu:v5p:4x4x4
    """
    from moecc.model.open import open_model
    from moecc.plan.sweeps import plan_page, sweep_page

    for file in (html, save):
        check_writable(file, force=force)
    if price is not None and tokens is None and not sweep:
        raise UsageError("--price has no run to price", hint="state the tokens: --tokens N")
    if sweep:
        singles = {
            "--save writes": save is not None,
            "--explore is about": explore,
            "--tokens is about": tokens is not None,
            "--price is about": price is not None,
        }
        if stated := [option for option, is_set in singles.items() if is_set]:
            raise UsageError(
                Problem(f"{option} one plan, and a sweep has several",
                        hint="plan the model that you choose, without --sweep") for option in stated
            )  # fmt: skip
        axes, passes = parse_sweep(sweep), read_pipeline(pipeline, load)
        check_step(machine, config)
        with open_model(model, config_alone=True) as opened:
            points = plan_sweep(Swept(opened.graph, passes, model, machine, config), axes)
        if html is not None:
            _write("sweep", html, sweep_page(points, pipeline), force)
        return Report("sweep", points, lambda: sweep_text(points))
    passes = read_pipeline(pipeline, load)
    check_step(machine, config)
    with open_model(model, config_alone=True) as opened:
        run_pipeline(opened.graph, passes)
        graph = without_opaque(opened.graph)
    data, strategies = plan_step(graph, model, machine, config, explore)
    for idea in data["explored"]:
        idea["command"] = _command(model, machine, pipeline, config, idea["options"])
    if tokens is not None:
        data["run"] = run_json(data, tokens, price)
        _remark_on_packing(graph, model, machine, config, data["best"]["seconds"])
    _remark(graph, config, data["best"]["mesh"])
    if html is not None:
        _write("plan", html, plan_page(data, strategies, pipeline), force)
    if save is not None:
        request = {"model": model, "machine": machine, "pipeline": pipeline}
        _write("plan", save, saved_text(data, request | asdict(config)), force)
    return Report("plan", data, lambda: plan_text(data))


def _write(noun: str, file: str, text: str, force: bool) -> None:
    write_whole(file, text.encode(), force=force)
    say(f"the {noun} is in {file}")


def _command(model: str, machine: str, pipeline: str, config: StepConfig, options: str) -> str:
    """Return the command line that asks for an idea; empty where nothing does."""
    if not options:
        return ""
    _, is_compiled, stated_options = options.rpartition("moecc compile ")
    asked = {word for word in stated_options.split() if word.startswith("--")}
    default = StepConfig()
    stated = " ".join(
        as_option(name, value if value is True else shlex.quote(str(value)))
        for name, value in asdict(config).items()
        if value != getattr(default, name) and option_name(name) not in asked
    )
    verb = "compile" if is_compiled else "plan"
    words = ["moecc", verb, shlex.quote(model), "--machine", shlex.quote(machine)]
    words += ["-p", shlex.quote(pipeline)] if pipeline else []
    return " ".join([*words, *([stated] if stated else []), stated_options])


_PACKING = "pack-segments{documents=several}"


def _remark_on_packing(
    graph: Graph, model: str, machine: str, config: StepConfig, unpacked_seconds: float
) -> None:
    """Say how long a training step takes whose rows are packed, as recipes pack them."""
    if not config.train:
        return
    packed = clone(graph)
    try:
        run_pipeline(packed, Pipeline.parse(_PACKING), context=Context(allow_unmatched=True))
    except InputError:  # its rows are not packed, or packed already
        return
    try:
        seconds = plan_step(packed, model, machine, config)[0]["best"]["seconds"]
    except InputError:
        took = "no plan fits"
    else:
        if seconds <= unpacked_seconds:
            return
        took = f"a step takes {seconds_text(seconds)}"
    say(f"note: with packed documents, as moecc train packs them, {took}: "
        f"-p '…,{_PACKING}' plans it")  # fmt: skip


def _remark(graph: Graph, config: StepConfig, mesh: Json) -> None:
    """Say what rules leave unsharded, and whether a training step can only be planned."""
    rules = read_layouts(config.layout_names or ())
    if (text := remark_on_groups(rules, mesh)) and describe(graph).expert_layers:
        say(f"note: {text}")
    if not config.train or is_trainable(graph):
        return
    if reads_tokens(graph):
        text = "compile takes its training step after -p tie-head, as train on masked tokens does"
    else:
        text = "its training step is planned, but neither compile nor train takes it"
    say(f"note: the model has no logits: {text}")
