"""A model in Python: opened, rewritten by passes into new ones, planned, saved, verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.ahead.request import LoadedStep, StepLoader
from moecc.api.arguments import (
    arrays_of,
    continuing,
    dtype_of,
    family_text,
    flag,
    folder_text,
    machine_text,
    named_places,
    pass_text,
    pipeline_of,
    positive,
    source_text,
    step_request,
    swept_values,
    texts_of,
    whole,
)
from moecc.backend import TracingBackend, backend_with, get_backend
from moecc.errors import InputError, Problem, UsageError, nearest, raise_problems
from moecc.formats.files import read_whole
from moecc.formats.source import GivenParams
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.jobs.conversion import target_for
from moecc.jobs.convert import Conversion, plan, write
from moecc.jobs.generate import Continuer, generate_texts
from moecc.model.initialise import add_statistics
from moecc.model.inputs import check_inputs, default_inputs
from moecc.model.open import OpenedModel, Params, add_branches, open_model, reads_small
from moecc.plan.report import plan_text
from moecc.plan.search import seconds_text
from moecc.plan.step import mesh_text
from moecc.plan.sweeps import sweep_of, sweep_text
from moecc.rewrite.passes import EXACT, Context, Preserves, Statistics, weakest
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.page import render
from moecc.support.process import Closing
from moecc.support.text import brief, count_text, facts_table, size_text
from moecc.support.untyped import Json, JsonDict
from moecc.types import DTYPES, F32, Array, Arrays, TensorType
from moecc.weights.expr import Source

if TYPE_CHECKING:
    from moecc.families.describe import Description
    from moecc.jobs.comparison import ComparisonVerdict
    from moecc.jobs.conversion import Plan


# Models and plans as a notebook shows them: a line, or a table of HTML.


@dataclass(frozen=True, repr=False)
class StepPlan:
    """A plan of a step on a machine.

    Attributes:
      report: its numbers, the keys as ``docs/cli.md`` has them: seconds are of a step, bytes and
        FLOPs of one device.
    """

    report: JsonDict

    @property
    def best(self) -> JsonDict:
        """The fastest strategy that fits and keeps the function."""
        best: JsonDict = self.report["best"]
        return best

    def __str__(self) -> str:
        return plan_text(self.report)

    def __repr__(self) -> str:
        best, machine = self.best, self.report["machine"]
        mesh = mesh_text(best["mesh"])
        rows = [
            ("", f"{self.report['model']} on {machine['name']}"), ("mesh", mesh or "one device"),
            ("step", seconds_text(best["seconds"])),
            ("memory", f"{size_text(best['total_bytes'])} of {size_text(machine['usable_bytes'])}"),
        ]  # fmt: skip
        return brief("moecc.StepPlan", rows)

    def _repr_html_(self) -> str:
        return render("text.html", text=plan_text(self.report))


@dataclass(frozen=True, repr=False)
class PlanSweep:
    """Plans of one model with other numbers of experts, choices and capacities.

    Attributes:
      report: the numbers, the keys as ``docs/cli.md`` has them.
      pipeline: the passes of the models, as text.
    """

    report: JsonDict
    pipeline: str = ""

    @property
    def points(self) -> list[JsonDict]:
        """The models, each planned, or with the problem that it has."""
        points: list[JsonDict] = self.report["points"]
        return points

    def __str__(self) -> str:
        return sweep_text(self.report)

    def __repr__(self) -> str:
        axes = (f"{n}={','.join(map(str, v))}" for n, v in self.report["axes"].items())
        planned = sum(point["best"] is not None for point in self.points)
        rows = [
            ("", f"{self.report['model']} on {self.report['machine']['name']}"),
            ("", " ".join(axes)), ("planned", f"{planned} of {len(self.points)}"),
        ]  # fmt: skip
        return brief("moecc.PlanSweep", rows)

    def _repr_html_(self) -> str:
        return render("text.html", text=sweep_text(self.report))


def summary(
    name: str, facts: Description, pipeline: Pipeline, preserves: Preserves
) -> dict[str, str]:
    """Return what is said of a model in a line: a text for each name, empty if there is none."""
    experts = {f"{layer.experts} experts, top-{layer.top_k}" for layer in facts.expert_layers}
    return {
        "name": name,
        "family": facts.family,
        "layers": str(facts.layers),
        "parameters": count_text(facts.parameters.total),
        "active": count_text(facts.parameters.active),
        "experts": "; ".join(sorted(experts)),
        "pipeline": str(pipeline),
        "preserves": str(preserves) if len(pipeline) else "",
    }


Compiled = Callable[[Arrays, Arrays], dict[str, Array]]
"""A graph as a pure function of parameters and inputs, which jax transforms."""

NOTHING = Pipeline(())


def open(
    source: str | os.PathLike[str] | Model,
    *,
    weights: str | os.PathLike[str] | None = None,
    padding: bool = False,
    seed: int = 0,
    experts: Mapping[str, str | os.PathLike[str]] | None = None,
    capture: str | os.PathLike[str] | None = None,
    allow_other_base: bool = False,
) -> Model:
    """Open a model: only configs and headers are read.

    Args:
      source: a Hugging Face folder, a ``.gguf`` or ``.moe`` file, ``preset:NAME``, or a run of
        `moecc train`; a model is returned as it is.
      weights: for a ``.moe`` file, the checkpoint to read in place of the one that it names.
      padding: whether the graph of an encoder has an input ``mask``.
      seed: of all random numbers of passes.
      experts: further models of its architecture, or LoRA adapters of it, by the names that
        ``upcycle(sources="base,a")`` has for them.
      capture: the folder of statistics of the model that `moecc capture` wrote.
      allow_other_base: whether an adapter may name another model than this as its own.

    Raises:
      InputError: it is none of these, or is faulty.
      UsageError: an argument cannot be used.
    """
    if isinstance(source, Model):
        return source
    seed, padding = whole("seed", seed), flag("padding", padding)
    checkpoint = None if weights is None else source_text(weights)
    name = source_text(source)
    opened = open_model(
        os.path.abspath(name) if os.path.exists(name) else name,
        weights=checkpoint,
        padding=padding,
        config_alone=True,
    )
    opened = replace(opened, name=name)
    allowed = flag("allow_other_base", allow_other_base)
    add_branches(opened, named_places(experts), allow_other_base=allowed)
    statistics = add_statistics(opened, None if capture is None else source_text(capture))
    return Model(opened, seed=seed, statistics=statistics)


@dataclass(frozen=True, eq=False, repr=False)
class Model(Closing):
    """A model, and the passes that made it; nothing is rewritten in place.

    Attributes:
      opened: the source.
      pipeline: the passes that were applied to it.
      seed: of their random numbers.
      rewritten: the graph after them; None for that of the source.
      preserves: what they promise together.
      remarks: what they reported.
      allow_unmatched: whether one that must match may have matched nothing.
      statistics: what was captured of the source's values, if anything.
    """

    opened: OpenedModel
    pipeline: Pipeline = NOTHING
    seed: int = 0
    rewritten: Graph | None = None
    preserves: Preserves = EXACT
    remarks: tuple[str, ...] = ()
    allow_unmatched: bool = False
    statistics: Statistics | None = None

    @property
    def name(self) -> str:
        """The source's name in messages."""
        return self.opened.name

    @property
    def graph(self) -> Graph:
        """The graph, after all passes."""
        return self.opened.graph if self.rewritten is None else self.rewritten

    @property
    def facts(self) -> Description:
        """The model in numbers: stored and active parameters, FLOPs per token, expert layers."""
        from moecc.families.describe import describe

        return describe(self.graph)

    def upcycle(self, **options: object) -> Model:
        """Return the model with experts in place of feed-forward blocks.

        Args:
          **options: of the pass ``upcycle``, with underscores: ``experts=8, top_k=2``.

        Raises: as `apply`.
        """
        return self.apply(pass_text("upcycle", options))

    def apply(self, pipeline: object, *, allow_unmatched: bool = False) -> Model:
        """Return the model that `pipeline` makes of this one.

        Args:
          pipeline: text, ``"upcycle{experts=8},add-losses"``, a pass, or several of either.
          allow_unmatched: whether a pass that must match may match nothing.

        Raises:
          UsageError: the pipeline is wrong.
          InputError: a pass cannot be applied to this model.
        """
        passes, allow_unmatched = pipeline_of(pipeline), flag("allow_unmatched", allow_unmatched)
        remarks = passes.remarks()
        context = replace(self._context(allow_unmatched), remark=lambda r: remarks.append(str(r)))
        full_pipeline = Pipeline((*self.pipeline, *passes))
        raise_problems(full_pipeline.problems(), UsageError)
        graph = clone(self.graph)
        done = run_pipeline(graph, passes, context=context)
        return Model(
            self.opened, full_pipeline, self.seed, graph, weakest((self.preserves, done.preserves)),
            (*self.remarks, *remarks), self.allow_unmatched or allow_unmatched, self.statistics,
        )  # fmt: skip

    def _context(self, allow_unmatched: bool) -> Context:
        """Return what passes may read of this model."""
        seed, statistics = self.seed, self.statistics
        context = Context(seed=seed, allow_unmatched=allow_unmatched, statistics=statistics)
        if (checkpoint := self.opened.checkpoint) is None:
            return context
        return replace(context, read=reads_small(checkpoint), models=tuple(checkpoint.branches))

    def params(self, *, dtype: object = "f32") -> Params:
        """Return the parameters by name, each made when it is looked up.

        An array has the axes of ``graph.params[name].type``, in their order: that of the
        checkpoint for a dense model, ``[expert, mlp, embed]`` for experts that a pass made.

        Args:
          dtype: the element type of the arrays.

        Raises:
          InputError: there are no weights.
        """
        return self.model.params(dtype=dtype_of(dtype) or F32)

    def function(self, *, dtype: object = "f32") -> Compiled:
        """Return the graph as ``f(params, inputs) → outputs``, for ``jax.jit`` and ``jax.grad``.

        All three are arrays by name: parameters as `params` has them, inputs such as ``tokens:
        i32[batch, seq]``, outputs such as ``logits: [batch, seq, vocab]``; losses are scalars, in
        nats.

        Args:
          dtype: the element type of the computation.

        Raises:
          MachineError: jax is not installed.
        """
        return backend_with(TracingBackend).function(self.graph, dtype=dtype_of(dtype) or F32)

    def run(
        self, inputs: Arrays | None = None, *, dtype: object = "f32", backend: str = "reference"
    ) -> dict[str, Array]:
        """Return the outputs by name, ``logits: [batch, seq, vocab]`` for instance.

        Args:
          inputs: arrays by name, ``tokens: i32[batch, seq]`` and ``mask: pred[batch, seq]`` for
            instance; None draws two sequences of at most 128 tokens.
          dtype: the element type of the computation; the reference computes in float64 always.
          backend: ``"reference"`` or ``"xla"``.

        Raises:
          InputError: an input does not fit, or there are no weights.
        """
        arrays = default_inputs(self.graph) if inputs is None else arrays_of(inputs)
        program = get_backend(backend).compile(self.graph, dtype=dtype_of(dtype) or F32)
        return program.run(self.params(), check_inputs(self.graph, arrays, "inputs"))

    def generate(
        self,
        prompt: str | Sequence[str],
        tokens: int = 24,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        dtype: object = "f32",
    ) -> str | list[str]:
        """Return the text that follows a prompt, or the texts that follow several.

        The weights stay in memory for the next call.

        Args:
          prompt: the prompt, or several; of an encoder-decoder, what its encoder reads.
          tokens: the most tokens to add.
          temperature: 0 takes the likeliest token, and larger values draw one.
          top_k: only so many of the likeliest tokens are drawn; 0 for all.
          top_p: only the likeliest tokens that have this probability together.
          seed: of the draws.
          stop: tokens that end a text besides those of the config, as the vocabulary writes them.
          dtype: the type to compute in.

        Raises:
          UsageError: an argument cannot be used.
          InputError: the model cannot continue texts, or there is no tokenizer beside its weights.
        """
        how = continuing(tokens, temperature, top_k, top_p, seed, dtype)
        prompts, ends = texts_of("prompt", prompt), texts_of("stop", stop)
        generated = generate_texts(self.model, prompts, how, stop=ends, continuer=self._continuer)
        continuations = [m.text for m in generated]
        return continuations[0] if isinstance(prompt, str) else continuations

    def plan(self, machine: str, *, explore: bool = False, **options: object) -> StepPlan:
        """Predict memory, time and traffic of a step on a machine, and find the best mesh.

        Args:
          machine: ``tpu:v5p:4x4x4``, ``h100x8``, or the path of a file of your own, ``ours.toml``.
          explore: whether what one would try besides is priced, too.
          **options: of ``moecc plan``, with underscores: ``batch_tokens=2**20, remat="full"``.

        Raises:
          UsageError: there is no such machine or option.
          InputError: nothing fits.
        """
        from moecc.jobs.plan import plan_step

        name, step = machine_text(machine), step_request(options)
        explored = flag("explore", explore)
        return StepPlan(plan_step(self.graph, self.name, name, step, explored)[0])

    def sweep(
        self,
        machine: str,
        *,
        experts: object = (),
        top_k: object = (),
        capacity_factor: object = (),
        **options: object,
    ) -> PlanSweep:
        """Plan the model with other numbers of experts, choices and capacities, each of them.

        Args:
          machine: as of `plan`.
          experts: of a layer: ``[8, 16, 32]``; the pass that made experts makes so many, or the
            config has so many; none: as they are.
          top_k: experts of a token, likewise.
          capacity_factor: numbers above 0, or ``"dropless"``.
          **options: as of `plan`.

        Raises:
          UsageError: there is no such machine or option, or a value is not one.
          InputError: no model of these can be made and fits.
        """
        from moecc.jobs.plan import Swept, plan_sweep

        step, passes = step_request(options), self.pipeline
        axes = sweep_of(*map(swept_values, (experts, top_k, capacity_factor)))
        name, context = machine_text(machine), self._context(self.allow_unmatched)
        swept = Swept(self.opened.graph, passes, self.name, name, step, context)
        return PlanSweep(plan_sweep(swept, axes), str(passes))

    def prepare(
        self, to: str = "auto", *, dtype: object = None, check: bool = True, emit: str | None = None
    ) -> Plan:
        """Plan a conversion to another family; only headers are read.

        Args:
          to: the family, ``gguf:ARCH``, or ``auto``.
          dtype: the element type to write; None keeps that of the source.
          check: whether each pass is held to its promise, on the model at small sizes.
          emit: the language of a program to write beside the tensors of ``st_moe``.

        Raises:
          UsageError: there is no such family or type.
          InputError: the family cannot express the model, or the source has no weights.
          CheckError: a pass broke its promise.
        """
        to, check = family_text(to), flag("check", check)
        fresh = OpenedModel(clone(self.opened.graph), self.name, self.opened.checkpoint)
        return plan(
            fresh, self.pipeline, to, dtype=dtype_of(dtype), seed=self.seed,
            allow_unmatched=self.allow_unmatched, check=check, statistics=self.statistics,
            emit=emit,
        )  # fmt: skip

    def save(
        self,
        folder: str | os.PathLike[str],
        to: str | None = None,
        dtype: object = None,
        *,
        force: bool = False,
    ) -> Model:
        """Write the model as another family, atomically, and return it opened from there.

        Args:
          folder: where to; for a GGUF file also that file.
          to: the family, or ``gguf:ARCH``; None for one that engines read, of GGUF in its file.
          dtype: the element type to write; None keeps that of the source.
          force: whether an existing output is replaced.

        Raises: as `prepare`; InputError or MachineError if the output cannot be written.
        """
        path, force = folder_text(folder), flag("force", force)
        target = target_for(family_text(to), path)
        write(self.prepare(target, dtype=dtype), path, force=force)
        return open(path, seed=self.seed)

    def emit(
        self,
        language: str,
        folder: str | os.PathLike[str],
        dtype: object = None,
        *,
        force: bool = False,
    ) -> Model:
        """Write the model as a program, with its weights, and return it opened from there.

        Args:
          language: ``"torch"``: one readable file that transformers loads; ``"jax"``: functions of
            a dictionary of parameters.
          folder: where to.
          dtype: the element type to write; None keeps that of the source.
          force: whether an existing output is replaced.

        Raises: as `prepare`; InputError or MachineError if the output cannot be written.
        """
        path, force = folder_text(folder), flag("force", force)
        write(self.prepare("st_moe", dtype=dtype, emit=language), path, force=force)
        return open(path, seed=self.seed)

    def verify(
        self, against: str | os.PathLike[str] | Model, *, tolerance: float = 1e-5
    ) -> ComparisonVerdict:
        """Run this model and another on the same tokens, and compare their logits.

        Args:
          against: the other model, or what `open` takes.
          tolerance: the bound on the largest difference of two logits, relative to the largest
            magnitude of a logit of the other model.

        Raises:
          InputError: the two have other inputs or shapes, or no weights.
        """
        from moecc.jobs.comparison import compare

        positive("tolerance", tolerance)
        return compare(self.model, open(against).model, tolerance=tolerance)

    def close(self) -> None:
        """Close the files of the source, which all models made of it share."""
        self.opened.close()

    def __repr__(self) -> str:
        return brief("moecc.Model", self._rows())

    def _repr_html_(self) -> str:
        remarks = (("remark", remark) for remark in dict.fromkeys(self.remarks))
        return facts_table([*self._rows(), *remarks])

    def _rows(self) -> list[tuple[str, str]]:
        return list(summary(self.name, self.facts, self.pipeline, self.preserves).items())

    @cached_property
    def _continuer(self) -> Continuer:
        return Continuer(self.model)

    @property
    def model(self) -> OpenedModel:
        """The source with the graph after all passes, as tasks take it."""
        return OpenedModel(self.graph, self.name, self.opened.checkpoint)


# Write parameters that a loop of one's own trained, as a checkpoint with manifest and card.


def write_params(
    model: Model | OpenedModel | str | os.PathLike[str],
    params: Mapping[str, Json],
    folder: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: object = None,
    force: bool = False,
) -> Conversion:
    """Write `params` in place of the parameters of `model` to a new folder.

    Args:
      model: what `moecc.open` returned, perhaps rewritten by passes, or what it takes.
      params: an array for each parameter of the graph, by name, NumPy's or jax's, with the shape
        of its type: those that `Model.params` has.
      folder: where to.
      to: the family to write; None for one that engines read.
      dtype: the element type to write; None for that of the arrays.
      force: whether an existing folder is replaced.

    Raises:
      UsageError: an argument cannot be used.
      InputError: an array is missing, unknown or of another shape, or holds what is not finite; the
        family cannot express the model; the folder cannot be used.
      MachineError: the disk is too small.
    """
    if not isinstance(params, Mapping):
        raise UsageError("parameters are arrays by name", found=type(params).__name__)
    opened = model if isinstance(model, OpenedModel) else open(model).model
    path, element_type = folder_text(folder), dtype_of(dtype)
    target = target_for(family_text(to), path)
    force = flag("force", force)
    if opened.checkpoint is None:
        raise InputError(f"{opened.name} has no files to write beside parameters")
    raise_problems(_misfits(opened.graph, params))
    graph = clone(opened.graph)
    checkpoint = GivenParams(opened.checkpoint, {name: params[name] for name in graph.params})
    for name, param in graph.params.items():
        stored = TensorType(checkpoint.tensors[name].dtype, param.type.bare.axes)
        param.weight = Source(name, stored)
    planned = plan(OpenedModel(graph, opened.name, checkpoint), NOTHING, target, dtype=element_type)
    return write(planned, path, force=force)


def _misfits(graph: Graph, params: Json) -> Iterator[Problem]:
    dtypes = {d.numpy for d in DTYPES.values() if d.is_float}
    for name in params:
        if name not in graph.params:
            problem = "the model has no such parameter"
            yield Problem(problem, str(name), hint=nearest(str(name), graph.params))
    for name, param in graph.params.items():
        if name not in params:
            yield Problem("no array is given", f"param %{name}", str(param.type))
            continue
        array = params[name]
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            kind = type(array).__name__
            yield Problem("this is no array", f"param %{name}", str(param.type), kind)
        elif tuple(array.shape) != param.type.shape or array.dtype not in dtypes:
            yield Problem("the array does not fit", f"param %{name}", str(param.type),
                          f"{array.dtype}{list(array.shape)}")  # fmt: skip


# `moecc.load_step`: a program that `moecc compile --save` wrote, to call.


def load_step(file: str | os.PathLike[str]) -> LoadedStep:
    """Return the step in a file that ``moecc compile --save`` wrote, to be called.

    A step is a program that a call runs on your devices, and the format has no checks of its own:
    load only files that you trust.

    Raises:
      UsageError: the argument is no path.
      InputError: the file is missing, or is no such artefact.
      MachineError: jax or flatbuffers is not installed.
    """
    path = source_text(file)
    return backend_with(StepLoader).load_step(read_whole(Path(path)), path)
