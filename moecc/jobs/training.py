"""Prepare a run of training: a new one, one that goes on, or a fork of another.

Everything that a recipe, a model and its data can have wrong is found here, before a folder is made
or a device is asked for.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moecc.errors import InputError, Problem, raise_problems
from moecc.families import build
from moecc.families.heads import MASKED_LM
from moecc.families.registry import parse_config
from moecc.formats.folder import CONFIG_NAME, OPTIMIZER_NAME, SafetensorsFolder, open_folder
from moecc.formats.manifest import check_manifest
from moecc.formats.output import check_output
from moecc.formats.run import (
    GRAPH,
    LINEAGE,
    RECIPE,
    SOURCE,
    TRAINED,
    RunCheckpoint,
    choose_step,
    is_run,
    no_run,
    require_run_files,
    run_stages,
    saved_steps,
    split_reference,
)
from moecc.formats.source import FIRST
from moecc.formats.trees import TreeCheckpoint
from moecc.ir.conventions import LOGITS
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import print_graph, read_graph
from moecc.jobs.convert import plan, write
from moecc.model.initialise import initialise
from moecc.model.open import TOKENIZER, OpenedModel, no_tensors, open_model, registry_with
from moecc.presets import PREFIX, preset_config
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.lazy import np
from moecc.support.text import listed
from moecc.train.batches import Batches, open_batches, resolved
from moecc.train.events import Beginning, Event, Exported, Saved, Teacher, TrainJob
from moecc.train.graphs import eval_graph, step_spec, teacher_graph, train_graph
from moecc.train.recipe import (
    ModelSection,
    Moments,
    Objective,
    OptimizerSection,
    Recipe,
    Start,
)
from moecc.train.recipe_text import (
    parse_recipe,
    recipe_differences,
    recipe_digest,
    recipe_file,
    write_recipe,
)
from moecc.train.rows import ModelFacts, facts_of
from moecc.train.run import OTHER_RUN, create_run, lineage, source_files
from moecc.train.settings import (
    COUNT,
    SAVED,
    carried_moments,
    count_of,
    parameter_settings,
    phases_of,
    saved_moments,
    section_at,
)
from moecc.train.state import Canonical, Weights, canonical
from moecc.train.tokens.encoders import (
    BYTES_DIGEST,
    byte_tokenizer,
    byte_tokenizer_config,
    tokenizer_digest,
)
from moecc.translate.export import export_graph
from moecc.translate.gguf import architecture_of, export_gguf
from moecc.translate.importing import readable_head
from moecc.translate.propose import check_target
from moecc.types import Array, TensorType, float_type
from moecc.weights.expr import source_types

# The model of a recipe: opened, its pipeline run, its parameters under their own names.


@dataclass(frozen=True)
class RecipeSource:
    """A model as a recipe takes it.

    Attributes:
      model: opened.
      canonical: its canonical graph, and how its parameters are made.
      preserves: what the pipeline does to the function.
      pipeline: in full.
      remarks: of its passes, and on what is not trained.
    """

    model: OpenedModel
    canonical: Canonical
    preserves: str
    pipeline: str
    remarks: tuple[str, ...]


@contextmanager
def open_source(recipe: Recipe, files: Sequence[str] = ()) -> Iterator[RecipeSource]:
    """Open the model of a recipe and run its pipeline.

    Args:
      recipe: the recipe.
      files: of the user, with passes and families.

    Raises:
      InputError: the source is faulty, or a pass does not suit it.
      UsageError: the pipeline is faulty.
    """
    section = recipe.model
    pipeline = Pipeline.parse(section.pipeline, registry_with(files))
    remarks: list[str] = []
    context = Context(seed=section.seed, remark=lambda r: remarks.append(str(r)))
    with _opened(section) as model:
        remarks += _left_untrained(model, recipe.data.objective)
        done = run_pipeline(model.graph, pipeline, context=context)
        if section.start is Start.RANDOM:
            initialise(model.graph, seed=section.seed)
        elif model.checkpoint is None:
            raise InputError(
                "the source has no weights", where=section.source,
                hint='model.start = "random" draws them',
            )  # fmt: skip
        model_graph = canonical(model.graph, float_type(recipe.run.weight_dtype))
        model_graph.graph.attrs.pop("checkpoint", None)
        yield RecipeSource(
            model, model_graph, str(done.preserves), pipeline.in_full(), tuple(remarks)
        )


def _left_untrained(model: OpenedModel, objective: Objective) -> Iterator[str]:
    """Yield remarks on what a training leaves behind: tensors of the checkpoint, or a head."""
    is_tied = objective is Objective.MASKED and LOGITS not in model.graph.output_names
    if model.checkpoint is not None and (unread := model.unread()):
        remark = f"not trained, and not in the run: {listed(unread)}"
        if is_tied:
            remark += "; logits are made by the embedding (tie-head)"
            if readable_head(model.checkpoint)[0] == MASKED_LM:
                remark += "; the head is trained after moecc convert --to st_moe"
        yield remark
    head = [name for name, value in model.graph.params.items() if value.loc == "head"]
    if is_tied and head and model.graph.attrs.get("head") != MASKED_LM:
        yield (
            f"masked tokens do not train the head: {listed(head)}; logits are made by the "
            "embedding (tie-head); decay shrinks the head where optimizer.groups do not freeze it"
        )


@contextmanager
def open_teacher(recipe: Recipe) -> Iterator[Teacher]:
    """Open the source that the model of a recipe is distilled from. Raises as `open_source`."""
    with open_model(recipe.model.source) as model:
        if model.checkpoint is None:
            raise InputError("the source has no weights", where=recipe.model.source)
        source = canonical(model.graph, float_type(recipe.run.weight_dtype))
        yield Teacher(source.graph, source.weights, model.checkpoint.read)


def teacher_of(recipe: Recipe) -> Callable[[], AbstractContextManager[Teacher]] | None:
    """Return what opens the teacher of a recipe; None without distillation."""
    return partial(open_teacher, recipe) if recipe.loss.distill else None


def _opened(section: ModelSection) -> OpenedModel:
    """Open the source of a recipe; where weights are drawn, a folder with a config is enough."""
    folder = Path(section.source)
    if section.start is Start.RANDOM and folder.is_dir() and not is_run(folder):
        checkpoint = open_folder(folder, with_weights=False)
        config = parse_config(checkpoint.config, str(folder / CONFIG_NAME))
        return OpenedModel(build(config), section.source, checkpoint)
    try:
        return open_model(section.source)
    except InputError as error:
        located = [replace(p, where=f"{p.where}: model.source") for p in error.problems]
        raise InputError(located) from None


def config_of(model: OpenedModel) -> bytes:
    """Return the config.json of a source."""
    config: object = model.graph.attrs.get("config", {})
    if model.checkpoint is not None:
        config = model.checkpoint.config
    elif model.name.startswith(PREFIX):
        config = preset_config(model.name)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


# The moments of a source, for the model that a recipe's pipeline made of it.

Known = Mapping[str, Mapping[str, TensorType]]
"""The types of moments by kind and tensor."""

_PREFIX = SAVED.partition("{")[0]
_RESET = 'model.moments = "reset" begins with zeros'


@dataclass(frozen=True)
class CarriedState:
    """Moments carried over from a trained model, with a reader of its parameters and moments.

    Attributes:
      moments: expressions by name, ``moments.m.NAME``.
      checkpoint: of the run, or of the program that trained it.
      factors: by which moments are multiplied that were begun later than others, by their names.
    """

    moments: Weights
    checkpoint: RunCheckpoint | TreeCheckpoint | SafetensorsFolder
    factors: Mapping[str, float]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows of a parameter, or of what begins with ``moments.``."""
        if not name.startswith(_PREFIX):
            return self.checkpoint.read(name, start, stop)
        if isinstance(self.checkpoint, RunCheckpoint):
            moment = self.checkpoint.state.read(name, start, stop)
            return moment * np.float32(self.factors[name]) if name in self.factors else moment
        kind, _, tensor = name.removeprefix(_PREFIX).partition(".")
        if kind == COUNT:
            assert self.checkpoint.moments is not None, "it has been looked at"
            return np.asarray(self.checkpoint.moments.count, np.int32)
        return self.checkpoint.read_moment(kind, tensor, start, stop)


def carried_from(source: RecipeSource, section: OptimizerSection) -> CarriedState:
    """Return the moments of a model before its first step, where its source has some.

    Raises:
      InputError: the source has none, or was trained by another optimiser.
    """
    checkpoint, graph = source.model.checkpoint, over_its_source(source.canonical)
    factors: Mapping[str, float] = {}
    if isinstance(checkpoint, RunCheckpoint):
        saved, count, factors = _of_run(checkpoint, section)
    elif (
        isinstance(checkpoint, TreeCheckpoint | SafetensorsFolder)
        and (moments := checkpoint.moments) is not None
    ):
        _require_same(moments.optimizer, section, str(checkpoint.path))
        saved, count = _of_checkpoint(checkpoint, moments.of, graph), moments.count
    else:
        raise InputError(
            "only a run, a checkpoint of Orbax or T5X with its optimiser, or a folder with "
            f"{OPTIMIZER_NAME} has moments to carry over",
            where="model.moments", found=source.model.name, hint=_RESET,
        )  # fmt: skip
    return CarriedState(carried_moments(graph, section, saved, count), checkpoint, factors)


def _of_run(
    checkpoint: RunCheckpoint, section: OptimizerSection
) -> tuple[Known, int, Mapping[str, float]]:
    recipe = checkpoint.run / RECIPE
    before = parse_recipe(recipe_file(recipe), str(recipe), folder=checkpoint.run).optimizer
    _require_same(before.name, section, str(checkpoint.run))
    graph, step = read_graph(str(checkpoint.run / GRAPH)), checkpoint.step
    saved = saved_moments(graph, section_at(before, step.number))
    read, firsts = checkpoint.state.read, {p.first_step for p in phases_of(before)}
    counts = {n: int(read(f"{_PREFIX}{count_of(n)}")) for n in firsts if n <= step.number}
    settings = parameter_settings(graph, before)
    factors = {
        SAVED.format(kind, name): factor
        for kind, types in saved.items()
        for name in types
        if (factor := _factor(before, kind, counts[settings[name].first_step], counts[0])) != 1
    }
    return saved, counts[0], factors


def _factor(section: OptimizerSection, kind: str, count: int, counted: int) -> float:
    """Return what makes a mean of `count` updates one that is corrected as of `counted`.

    A mean that began with zeros is divided by 1 - decay^count (Kingma and Ba 2015, §3), but for
    Adafactor, which corrects none.
    """
    if section.name == "adafactor" or not 0 < count < counted:
        return 1.0
    decay = section.b1 if kind == FIRST else section.b2
    return (1 - decay**counted) / (1 - decay**count)


def _of_checkpoint(
    checkpoint: TreeCheckpoint | SafetensorsFolder,
    kinds: Mapping[str, Collection[str]],
    graph: Graph,
) -> Known:
    types = source_types(graph.weights.values())
    return {
        kind: {n: checkpoint.moment_type(kind, n, types[n]) for n in names if n in types}
        for kind, names in kinds.items()
    }


def _require_same(before: str, section: OptimizerSection, where: str) -> None:
    if before != section.name:
        raise InputError(
            f"the source has no moments of {section.name}", where="model.moments",
            found=f"{where} was trained by {before}", hint=_RESET,
        )  # fmt: skip


def over_its_source(canonical_model: Canonical) -> Graph:
    """Return a copy of the graph of a model whose weights read the tensors of its source."""
    graph = clone(canonical_model.graph)
    for name, param in graph.params.items():
        param.weight = canonical_model.weights[name]
    return graph


# Exports of a run while it is trained: written, read back, and compared with their manifest.

EXPORTS = "exports"
"""The folder of a run with its exports, by the numbers of their steps."""

DEFAULT_TARGET = "auto"


def exported(job: TrainJob, events: Iterable[Event]) -> Iterator[Event]:
    """Yield `events`, and `Exported` after a step that was saved and is due to be exported.

    The last step of a local run is exported first where the run was killed before it was.

    Raises:
      InputError: the family cannot express the model.
      CheckError: what was written is not what is read back.
      MachineError: the disk is full.
    """
    every = job.recipe.run.export_steps
    step = _last_step(job.run) if job.store is None else 0
    if every and step % every == 0 and step and not (job.run / EXPORTS / str(step)).exists():
        yield Exported(step, export_step(job, step))
    for event in events:
        yield event
        if isinstance(event, Saved) and every and event.step % every == 0:
            yield Exported(event.step, export_step(job, event.step))


def _last_step(run: Path) -> int:
    """Return the steps at the last checkpoint of a run; 0 where it is none of its own."""
    steps = saved_steps(run)
    number = steps[-1].number if steps else 0
    return 0 if steps and run_stages(run)[-1].get("from_step") == number else number


def export_step(job: TrainJob, step: int) -> Path:
    """Write ``exports/N`` of a run, and compare it with its manifest. Raises as `exported`."""
    out = job.run / EXPORTS / str(step)
    out.parent.mkdir(exist_ok=True)
    if job.store is not None:
        job.store.complete(step)
    with open_model(f"{job.run}@{step}") as model:
        target = job.recipe.run.export_to or DEFAULT_TARGET
        # The folder is beside its source, in a place of its own.
        write(plan(model, Pipeline.parse(""), target), out, force=True)
    check_manifest(out)
    return out


def new_run(recipe: Recipe, source: RecipeSource, out: Path) -> TrainJob:
    """Return the job of a new run.

    Raises:
      InputError: recipe, model and data do not suit one another, or `out` cannot be used.
    """
    inputs = () if source.model.checkpoint is None else tuple(source.model.checkpoint.places())
    check_output(out, inputs=inputs, resume=True, hint=OTHER_RUN)
    graph = source.canonical.graph
    batches = _checked(recipe, graph, partial(facts_of, source.model))
    recipe = resolved(recipe, batches)
    if recipe.model.moments is Moments.CARRY:
        carried_from(source, recipe.optimizer)
    digest, section = recipe_digest(recipe), recipe.model

    def create() -> None:
        create_run(
            out, recipe=write_recipe(recipe), graph=print_graph(graph), inputs=inputs,
            lineage=lineage(source.model, {
                "kind": TRAINED, "family": source.canonical.graph.family,
                "pipeline": section.pipeline, "pipeline_in_full": source.pipeline,
                "seed": section.seed, "preserves": source.preserves,
                "start": section.start.value, "moments": section.moments.value,
                "recipe": digest, "recipe_toml": write_recipe(recipe), "data": batches.digests,
            }),
            source=_source_files(source.model, batches),
        )  # fmt: skip

    return TrainJob(
        out, recipe, digest, graph, batches, create, lambda: _beginning(recipe, source),
        teacher=teacher_of(recipe),
    )  # fmt: skip


def resumed_run(
    run: Path,
    sets: Sequence[str],
    recipe: Recipe | None,
    files: Sequence[str],
) -> TrainJob:
    """Return the job of a run that goes on.

    Args:
      run: its folder.
      sets: values of its recipe to replace; only the mesh may be.
      recipe: one that the run is expected to have.
      files: of the user, with the passes and families that it began with.

    Raises:
      InputError: it is no run, its recipe was changed, or another one is expected.
    """
    if not is_run(run):
        raise no_run(run)
    begun = _begun_with(run)
    text = recipe_file(run / RECIPE)
    current = recipe or parse_recipe(text, str(run / RECIPE), folder=run, sets=sets)
    if not current.data.decoder_seq:
        # The run has the length that its data needed.
        current = replace(current, data=replace(current.data, decoder_seq=begun.data.decoder_seq))
    differences = recipe_differences(begun, current)
    if differences:
        quoted = shlex.quote(str(run))
        raise InputError(
            "the run was begun with another recipe", where=run / RECIPE,
            expected="the same, but for [mesh] and local paths: model.source, tokens of [data]",
            found="; ".join(differences),
            hint=f"moecc train RECIPE --fork {quoted} --out FOLDER goes on with another recipe, "
            f"with {shlex.quote(str(run / RECIPE))} and --set for example",
        )  # fmt: skip
    if steps := saved_steps(run):
        require_run_files(steps[-1])
    graph = read_graph(str(run / GRAPH))
    batches = _checked(current, graph, partial(_facts_of_run, run, graph))
    before, now = run_stages(run)[-1].get("data", {}), batches.digests
    problems = [
        Problem(
            "the data changed since the run began", name, str(before.get(name, "no data")), digest
        )
        for name, digest in now.items()
        if before.get(name) != digest
    ]
    raise_problems(problems)
    return TrainJob(
        run, current, recipe_digest(current), graph, batches, lambda: None,
        lambda: _beginning_again(current, graph, files), teacher=teacher_of(current),
    )  # fmt: skip


def forked_run(recipe: Recipe, reference: str, out: Path) -> TrainJob:
    """Return the job of a new run that goes on from a step of another, under another recipe.

    Step, position in the data, parameters and moments are those of the other run.

    Raises:
      InputError: the other is no run, or recipe, model and data do not suit one another.
    """
    parts = split_reference(reference)
    if parts is None:
        raise no_run(reference)
    run, step = Path(parts[0]), choose_step(Path(parts[0]), parts[1])
    if step.number >= recipe.run.steps:
        raise InputError(
            "the run has as many steps already", where="run.steps",
            expected=f"more than {step.number}, where {reference} is", found=str(recipe.run.steps),
        )  # fmt: skip
    require_run_files(step)
    graph, begun = read_graph(str(run / GRAPH)), _begun_with(run)
    check_output(out, inputs=[run], resume=True, hint=OTHER_RUN)
    differences = [d for d in recipe_differences(begun, recipe) if d.startswith("model.")]
    if differences:
        raise InputError(
            "the model of a fork is that of the run", where="model",
            expected="the same, but for a local model.source", found="; ".join(differences),
            hint='model.source = "RUN" begins a run of its own, under another pipeline',
        )  # fmt: skip
    present, wanted = (
        _moments_after(graph, section, step.number)
        for section in (begun.optimizer, recipe.optimizer)
    )
    missing = sorted({name for name, *_ in wanted - present})
    if missing:
        raise InputError(
            "the run kept no such moments of what would be trained",
            where="optimizer",
            expected="the optimiser, the frozen groups and each from_step that it had at step "
            f"{step.number}",
            found=f"{len(missing)} parameters, {missing[0]} first",
            hint='model.source = "RUN" begins a run of its own, with moments = "carry" or none',
        )
    batches = _checked(recipe, graph, partial(_facts_of_run, run, graph))
    recipe = resolved(recipe, batches)
    digest = recipe_digest(recipe)

    def create() -> None:
        with open_model(f"{run}@{step.number}") as model:
            stage = {
                "kind": TRAINED, "from_step": step.number, "recipe": digest,
                "recipe_toml": write_recipe(recipe), "data": batches.digests,
            }  # fmt: skip
            create_run(
                out, recipe=write_recipe(recipe), graph=print_graph(graph), inputs=(run,),
                lineage=lineage(model, stage), begun=(step, digest),
                source=source_files(model, (run / SOURCE / "config.json").read_bytes()),
            )  # fmt: skip

    return TrainJob(
        out, recipe, digest, graph, batches, create, lambda: _beginning_again(recipe, graph),
        teacher=teacher_of(recipe),
    )  # fmt: skip


def _moments_after(
    graph: Graph, section: OptimizerSection, steps: int
) -> set[tuple[str, str, str, int]]:
    """Return name, kind, optimiser, and first counted step of the moments after so many steps."""
    section = section_at(section, steps)
    settings = parameter_settings(graph, section)
    return {
        (name, kind, section.name, settings[name].first_step)
        for kind, types in saved_moments(graph, section).items()
        for name in types
    }


def _checked(recipe: Recipe, graph: Graph, facts: Callable[[Graph], ModelFacts]) -> Batches:
    """Return the batches of a recipe, once graphs and step are known to suit it.

    Args:
      recipe: the recipe.
      graph: the model's.
      facts: makes what batches have to know of the graph of a step.
    """
    step = train_graph(graph, recipe)
    for phase in phases_of(recipe.optimizer):
        parameter_settings(step, phase.section)
    eval_graph(graph, recipe)
    step_spec(graph, recipe)
    if recipe.loss.distill:
        with open_teacher(recipe) as teacher:
            teacher_graph(teacher.graph, recipe, step)
    if recipe.run.export_steps:
        target = recipe.run.export_to
        if architecture := architecture_of(target):
            export_gguf(graph, architecture)
        elif target != DEFAULT_TARGET:
            check_target(target)
            export_graph(graph, target)
    return open_batches(recipe.data, facts(step))


def _source_files(model: OpenedModel, batches: Batches) -> dict[str, Path | bytes]:
    """Return the files of a source that a run keeps; of bytes there is a tokenizer, too."""
    files = source_files(model, config_of(model))
    folders = batches.folders.values()
    if TOKENIZER not in files and all(f.facts.tokenizer_digest == BYTES_DIGEST for f in folders):
        files |= {TOKENIZER: byte_tokenizer(), "tokenizer_config.json": byte_tokenizer_config()}
    return files


@contextmanager
def _beginning(recipe: Recipe, source: RecipeSource) -> Iterator[Beginning]:
    checkpoint = source.model.checkpoint
    read = no_tensors if checkpoint is None else checkpoint.read
    if recipe.model.moments is Moments.CARRY:
        carried = carried_from(source, recipe.optimizer)
        yield Beginning(source.canonical.weights, carried.read, carried.moments)
    else:
        yield Beginning(source.canonical.weights, read, {})


@contextmanager
def _beginning_again(
    recipe: Recipe, graph: Graph, files: Sequence[str] = ()
) -> Iterator[Beginning]:
    """Open the source of a run that has no checkpoint yet. Raises InputError if it changed."""
    with open_source(recipe, files) as source:
        before, now = _types(graph), _types(source.canonical.graph)
        if before != now:
            odd = sorted(before.items() ^ now.items())[:4]
            raise InputError(
                "the source is not the model that the run began with", where=recipe.model.source,
                found=", ".join(f"{name}: {type}" for name, type in odd),
            )  # fmt: skip
        with _beginning(recipe, source) as beginning:
            yield beginning


def _types(graph: Graph) -> dict[str, str]:
    return {name: str(param.type) for name, param in graph.params.items()}


def _facts_of_run(run: Path, graph: Graph, step: Graph) -> ModelFacts:
    model = OpenedModel(graph, str(run))
    tokenizer = run / SOURCE / TOKENIZER
    digest = tokenizer_digest(tokenizer.read_bytes()) if tokenizer.is_file() else None
    return replace(facts_of(model, step), tokenizer_digest=digest)


def _begun_with(run: Path) -> Recipe:
    """Return the recipe that a run was begun with, whatever its file says now."""
    text = run_stages(run)[-1].get("recipe_toml")
    return parse_recipe(str(text), str(run / LINEAGE), folder=run)
