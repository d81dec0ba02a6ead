"""Prepare a run of training: a new one, one that goes on, or a fork of another.

Everything that a recipe, a model and its data can have wrong is found here, before a folder is made
or a device is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from moecc.errors import InputError, Problem
from moecc.formats.output import check_output
from moecc.formats.run import (
    GRAPH,
    LINEAGE,
    RECIPE,
    SOURCE,
    TRAINED,
    choose_step,
    inputs_of,
    is_run,
    require_run_files,
    run_stages,
    saved_steps,
    split_reference,
)
from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.model.open import Model, no_tensors, open_model, read_graph
from moecc.support.untyped import JsonDict
from moecc.tasks.train_carried import carried_from
from moecc.tasks.train_exports import check_export
from moecc.tasks.train_source import Source, config_of, open_source
from moecc.train.batches import Batches, open_batches, resolved
from moecc.train.events import Beginning, TrainJob
from moecc.train.graphs import eval_graph, step_spec, train_graph
from moecc.train.recipe import Moments, OptimizerSection, Recipe
from moecc.train.recipe_text import (
    parse_recipe,
    recipe_differences,
    recipe_digest,
    recipe_file,
    write_recipe,
)
from moecc.train.rows import ModelFacts, facts_of
from moecc.train.run import create_run, lineage, source_files
from moecc.train.settings import parameter_settings, phases_of, saved_moments, section_at
from moecc.train.tokens.encoders import (
    BYTES_DIGEST,
    byte_tokenizer,
    byte_tokenizer_config,
    tokenizer_digest,
)

TOKENIZER = "tokenizer.json"

_FULL = "give another folder; moecc train --resume RUN goes on with a run"


def new_run(recipe: Recipe, source: Source, out: Path) -> TrainJob:
    """Return the job of a new run.

    Raises:
      InputError: recipe, model and data do not suit one another, or `out` cannot be used.
    """
    inputs = tuple(inputs_of(source.model.checkpoint))
    check_output(out, inputs=inputs, hint=_FULL)
    graph = source.made.graph
    batches = _checked(recipe, graph, partial(facts_of, source.model))
    recipe = resolved(recipe, batches)
    if recipe.model.moments is Moments.CARRY:
        carried_from(source, recipe.optimizer)
    digest = recipe_digest(recipe)

    def create() -> None:
        create_run(
            out, recipe=write_recipe(recipe), graph=print_graph(graph), inputs=inputs,
            lineage=lineage(source.model, _stage(recipe, digest, source, batches)),
            source=_source_files(source.model, batches),
        )  # fmt: skip

    return TrainJob(out, recipe, digest, graph, batches, create, lambda: _beginning(recipe, source))


def resumed_run(
    run: Path,
    sets: Sequence[str] = (),
    recipe: Recipe | None = None,
    files: Sequence[str] = (),
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
        raise InputError("this is not the folder of a run", where=str(run))
    begun = _begun_with(run)
    text = recipe_file(run / RECIPE)
    found = recipe or parse_recipe(text, str(run / RECIPE), folder=run, sets=sets)
    if not found.data.decoder_seq:
        # The run has the length that its data needed.
        found = replace(found, data=replace(found.data, decoder_seq=begun.data.decoder_seq))
    differences = recipe_differences(begun, found)
    if differences:
        raise InputError(
            "the run was begun with another recipe", where=str(run / RECIPE),
            expected="the same, but for its mesh", found="; ".join(differences),
            hint=f"moecc train RECIPE --fork {run} --out FOLDER goes on with another recipe",
        )  # fmt: skip
    if steps := saved_steps(run):
        require_run_files(steps[-1])
    graph = read_graph(str(run / GRAPH))
    batches = _checked(found, graph, partial(_facts_of_run, run, graph))
    _check_data(run, batches)
    return TrainJob(
        run, found, recipe_digest(found), graph, batches, lambda: None,
        lambda: _beginning_again(found, graph, files),
    )  # fmt: skip


def forked_run(recipe: Recipe, reference: str, out: Path) -> TrainJob:
    """Return the job of a new run that goes on from a step of another, under another recipe.

    Step, position in the data, parameters and moments are those of the other run.

    Raises:
      InputError: the other is no run, or recipe, model and data do not suit one another.
    """
    found = split_reference(reference)
    if found is None:
        raise InputError("this is not the folder of a run", where=reference)
    run, step = Path(found[0]), choose_step(Path(found[0]), found[1])
    if step.number >= recipe.run.steps:
        raise InputError(
            "the run has as many steps already", where="run.steps",
            expected=f"more than {step.number}, where {reference} is", found=str(recipe.run.steps),
        )  # fmt: skip
    require_run_files(step)
    graph = read_graph(str(run / GRAPH))
    check_output(out, inputs=[run], hint=_FULL)
    _check_moments(graph, _begun_with(run).optimizer, recipe.optimizer, step.number)
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
        out, recipe, digest, graph, batches, create, lambda: _beginning_again(recipe, graph)
    )


def _check_moments(
    graph: Graph, known: OptimizerSection, asked: OptimizerSection, step: int
) -> None:
    """Raise InputError if training goes on from `step` with moments that were not kept there."""
    kept, wanted = (
        {
            (kind, name)
            for kind, types in saved_moments(graph, section_at(section, step)).items()
            for name in types
        }
        for section in (known, asked)
    )
    missing = sorted(name for _, name in wanted - kept)
    if missing:
        raise InputError(
            "the run kept no such moments of what would be trained",
            where="optimizer",
            expected=f"the optimiser and the frozen groups that it had at step {step}",
            found=f"{len(missing)} parameters, {missing[0]} first",
            hint='model.source = "RUN" begins a run of its own, with moments = "carry" or none',
        )


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
    if recipe.run.export_steps:
        check_export(graph, recipe.run.export_to)
    return open_batches(recipe.data, facts(step))


def _stage(recipe: Recipe, digest: str, source: Source, batches: Batches) -> JsonDict:
    section = recipe.model
    return {
        "kind": TRAINED,
        "family": str(source.made.graph.attrs.get("family", "")),
        "pipeline": section.pipeline,
        "pipeline_in_full": source.pipeline,
        "seed": section.seed,
        "preserves": source.preserves,
        "start": section.start.value,
        "moments": section.moments.value,
        "recipe": digest,
        "recipe_toml": write_recipe(recipe),
        "data": batches.digests,
    }


def _source_files(model: Model, batches: Batches) -> dict[str, Path | bytes]:
    """Return the files of a source that a run keeps; of bytes there is a tokenizer, too."""
    files = source_files(model, config_of(model))
    folders = batches.folders.values()
    if TOKENIZER not in files and all(f.facts.tokenizer_digest == BYTES_DIGEST for f in folders):
        files |= {TOKENIZER: byte_tokenizer(), "tokenizer_config.json": byte_tokenizer_config()}
    return files


@contextmanager
def _beginning(recipe: Recipe, source: Source) -> Iterator[Beginning]:
    checkpoint = source.model.checkpoint
    read = no_tensors if checkpoint is None else checkpoint.read
    if recipe.model.moments is Moments.CARRY:
        found = carried_from(source, recipe.optimizer)
        yield Beginning(source.made.weights, found.read, found.moments)
    else:
        yield Beginning(source.made.weights, read, {})


@contextmanager
def _beginning_again(
    recipe: Recipe, graph: Graph, files: Sequence[str] = ()
) -> Iterator[Beginning]:
    """Open the source of a run that has no checkpoint yet. Raises InputError if it changed."""
    with open_source(recipe, files) as source:
        before, now = _types(graph), _types(source.made.graph)
        if before != now:
            odd = sorted(before.items() ^ now.items())[:4]
            raise InputError(
                "the source is not the model that the run began with", where=recipe.model.source,
                found=", ".join(f"{name}: {type}" for name, type in odd),
            )  # fmt: skip
        with _beginning(recipe, source) as found:
            yield found


def _types(graph: Graph) -> dict[str, str]:
    return {name: str(param.type) for name, param in graph.params.items()}


def _facts_of_run(run: Path, graph: Graph, step: Graph) -> ModelFacts:
    model = Model(graph, str(run))
    tokenizer = run / SOURCE / TOKENIZER
    digest = tokenizer_digest(tokenizer.read_bytes()) if tokenizer.is_file() else None
    return replace(facts_of(model, step), tokenizer_digest=digest)


def _last_stage(run: Path) -> JsonDict:
    return dict(run_stages(run)[-1])


def _begun_with(run: Path) -> Recipe:
    """Return the recipe that a run was begun with, whatever its file says now."""
    text = _last_stage(run).get("recipe_toml")
    return parse_recipe(str(text), str(run / LINEAGE), folder=run)


def _check_data(run: Path, batches: Batches) -> None:
    """Raise InputError if the data are not those that the run began with."""
    before, now = _last_stage(run).get("data", {}), batches.digests
    problems = [
        Problem("the data changed since the run began", name, str(before.get(name)), digest)
        for name, digest in now.items()
        if before.get(name) != digest
    ]
    if problems:
        raise InputError(problems)
