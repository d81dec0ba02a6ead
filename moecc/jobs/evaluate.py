"""``moecc evaluate``: held-out losses and accuracies of models, paired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Annotated, Any

from moecc.analysis import document_mixtures
from moecc.backend import backend_with, get_backend
from moecc.decoding import ReadOnce
from moecc.errors import Problem, raise_problems
from moecc.families.describe import sequence_flops
from moecc.ir.conventions import LOGITS
from moecc.ir.graph import Graph, Value
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.structure import clone
from moecc.ir.unroll import unrolled
from moecc.jobs.command import (
    Amount,
    BatchSize,
    ComputeType,
    Load,
    Report,
    SequenceLength,
    Spelling,
)
from moecc.model.open import OpenedModel, load_files, open_model
from moecc.plan.workload import length_variables
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.console import Bar, say
from moecc.support.lazy import np
from moecc.support.text import amount
from moecc.support.untyped import JsonDict
from moecc.train.batches import HeldOutBatches, collate, label_rows, open_batches
from moecc.train.graphs import check_objective, eval_graph
from moecc.train.recipe import (
    Corpus,
    DataSection,
    ModelSection,
    Objective,
    Recipe,
    RunSection,
    corpus_names,
)
from moecc.train.rows import LabelChoices, ModelFacts, facts_of
from moecc.train.scoring import (
    LossDifference,
    Scorer,
    ScoringBackend,
    TokenScores,
    UnitScores,
    by_document,
    macro_f1,
    paired_difference,
)
from moecc.train.tokens.folder import DOCUMENTS, FACTS, LABELLED, TokenFolder, open_tokens
from moecc.types import F32, Array, Arrays, DType, float_type

# Evaluate models on held-out token folders: losses, paired differences, accuracies of tasks.

Progress = Callable[[int, int], None]

SLOW_BATCH_FLOPS = 1e11
"""FLOPs of a batch that is announced: a core takes 2 to 10 seconds for products of matrices, and
minutes where they are attention's, whose scores it also exponentiates."""


@dataclass(frozen=True)
class EvaluationSpec:
    """Settings for the evaluation of models.

    Attributes:
      seq: tokens of a sequence.
      batch: sequences at a time; within them tokens compete for slots under a capacity.
      batches: the most batches of a folder.
      dtype: the type of the computation.
    """

    seq: int = 512
    batch: int = 8
    batches: int = 64
    dtype: DType = F32


@dataclass(frozen=True)
class SetScore:
    """The scores of a model on a folder.

    Attributes:
      kind: of `moecc.train.tokens.folder.KINDS`.
      scores: of its documents or examples that have a target.
      accuracy: of labelled examples: the share whose likeliest label is theirs.
      f1: likewise, the macro F1.
    """

    kind: str
    scores: UnitScores
    accuracy: float | None = None
    f1: float | None = None

    @property
    def exact(self) -> float | None:
        """Of examples: the share that greedy decoding finds: every token is the likeliest."""
        if self.kind == DOCUMENTS:
            return None
        return float((self.scores.hits == self.scores.tokens).mean())

    def to_json(self) -> JsonDict:
        """Return the score as JSON values."""
        tokens = int(self.scores.tokens.sum())
        return {
            "kind": self.kind,
            "loss": self.scores.loss,
            "perplexity": exp(min(self.scores.loss, 700.0)),
            "tokens": tokens,
            "documents": len(self.scores.tokens),
            "token_accuracy": int(self.scores.hits.sum()) / max(tokens, 1),
            "exact_match": self.exact,
            "accuracy": self.accuracy,
            "f1": self.f1,
        }


@dataclass(frozen=True)
class ModelEvaluation:
    """One model on all folders, by their names; `against` is paired with the first model's."""

    model: str
    sets: Mapping[str, SetScore]
    against: Mapping[str, LossDifference]

    def to_json(self) -> JsonDict:
        """Return the evaluation as JSON values."""
        paired = {
            name: {"difference": d.mean, "low": d.low, "high": d.high}
            for name, d in self.against.items()
        }
        sets = {n: {**s.to_json(), "against_first": paired.get(n)} for n, s in self.sets.items()}
        return {"model": self.model, "sets": sets}


def _named(data: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the folders by the last parts of their paths that tell them apart."""
    names = corpus_names(map(Corpus, data))
    for path, name in zip(data, names, strict=True):
        yield (name if names.count(name) == 1 else path), path


def score_of(
    model: OpenedModel,
    folder: TokenFolder,
    settings: EvaluationSpec,
    progress: Progress = lambda done, total: None,
) -> SetScore:
    """Return what a model makes of a folder.

    Args:
      progress: receives the batches that are scored, and all.

    Raises:
      InputError: the folder does not suit the model.
    """
    recipe = evaluation_recipe(model.graph, folder, settings)
    check_objective(model.graph, recipe.data.objective)
    graph = eval_graph(model.graph, recipe)
    facts = facts_of(model, graph)
    batches = open_batches(recipe.data, facts)
    for remark in dict.fromkeys(batches.remarks):
        say(f"remark: {remark}")
    dtype = settings.dtype
    params = OpenedModel(graph, model.name, model.checkpoint).params(dtype=dtype)
    held_out = next(iter(batches.evaluations.values()))
    _announce(model, held_out.batches, settings)
    scorer = backend_with(ScoringBackend).scorer(graph, params, dtype=dtype)

    def parts() -> Iterator[tuple[TokenScores, Array]]:
        for number in range(held_out.batches):
            yield scorer(held_out.batch(number)), held_out.documents(number)
            progress(number + 1, held_out.batches)

    every = by_document(parts(), folder.facts.documents)
    is_read = every.tokens > 0
    scored = UnitScores(every.losses[is_read], every.tokens[is_read], every.hits[is_read])
    score = SetScore(folder.facts.kind, scored)
    if score.kind != LABELLED:
        return score
    choices = LabelChoices(folder, np.flatnonzero(is_read))
    return _labels(score, choices, recipe.data, facts, scorer)


def _announce(model: OpenedModel, batches: int, settings: EvaluationSpec) -> None:
    """Say what batches cost that take long: nothing else is printed before the first is scored."""
    lengths = dict.fromkeys(length_variables(model.graph), settings.seq)
    flops = sequence_flops(unrolled(model.graph), lengths)
    total = settings.batch * (flops.weights + flops.attention)
    if total < SLOW_BATCH_FLOPS:
        return
    share = flops.attention / (flops.weights + flops.attention)
    count = f"{batches:,} batches" if batches > 1 else "a batch"
    say(
        f"evaluating {model.name}: {count} of {settings.batch} × {settings.seq:,} tokens, "
        f"{total:.1e} FLOPs each, {share:.0%} of them attention's; --sequence and --batch make "
        "them smaller"
    )


def evaluation_recipe(graph: Graph, folder: TokenFolder, settings: EvaluationSpec) -> Recipe:
    """Return a recipe whose evaluation is that of `folder` by a model with `graph`."""
    kind = folder.facts.kind
    if kind == LABELLED:
        objective = Objective.CLASSIFY
    elif kind != DOCUMENTS:
        objective = Objective.COMPLETION
    elif "decoder_tokens" in graph.inputs:
        objective = Objective.SPANS
    else:
        objective = Objective.CAUSAL if LOGITS in graph.outputs else Objective.MASKED
    corpus = (Corpus(str(folder.path)),)
    # Padding costs time; documents that meet in a row would cost the loss its meaning.
    packing = kind == DOCUMENTS and not any(document_mixtures(graph, settings.seq))
    data = DataSection(
        train=corpus, evaluate=corpus, objective=objective, batch=settings.batch,
        seq=settings.seq, packing=packing, evaluate_batches=settings.batches,
    )  # fmt: skip
    return Recipe(ModelSection("model"), data, RunSection(steps=1, dtype=settings.dtype.name))


def _labels(
    score: SetScore, choices: LabelChoices, data: DataSection, facts: ModelFacts, scorer: Scorer
) -> SetScore:
    """Return `score` with accuracy and F1: the label of the lowest loss, its end included."""
    shape, rows = label_rows(choices, data, facts)
    rng = np.random.default_rng(0)
    labels = []
    for start in range(0, rows.rows, data.batch):
        numbers = range(start, min(start + data.batch, rows.rows))
        rows_of_examples: list[Any] = [rows.segments(row, rng) for row in numbers]
        rows_of_examples += [[]] * (data.batch - len(rows_of_examples))
        labels.append(scorer(collate(rows_of_examples, shape)).by_row().losses)
    losses = np.concatenate(labels)[: rows.rows].reshape(-1, choices.labels)
    guesses = losses.argmin(axis=1)
    accuracy = float((guesses == choices.answers).mean())
    return replace(score, accuracy=accuracy, f1=macro_f1(choices.answers, guesses, choices.labels))


def evaluation_text(results: Sequence[ModelEvaluation]) -> str:
    """Return the human-readable report."""
    lines = []
    for result in results:
        lines.append(result.model)
        for name, score in result.sets.items():
            parts = [f"loss {score.scores.loss:.4f}"]
            for title, value in (
                ("exact", score.exact), ("accuracy", score.accuracy), ("F1", score.f1)
            ):  # fmt: skip
                if value is not None:
                    parts.append(f"{title} {value:.3f}")
            against = result.against.get(name)
            if against is not None:
                parts.append(
                    f"{against.mean:+.4f} ({against.low:+.4f} to {against.high:+.4f}) against "
                    f"{results[0].model}"
                )
            tokens = int(score.scores.tokens.sum())
            lines.append(f"  {name:16} {', '.join(parts)}, {amount(tokens, 'token')}")
    return "\n".join(lines)


# Run a model over the batches of a token folder, for values inside it rather than its logits.


@dataclass(frozen=True)
class Tracing:
    """A graph whose outputs are read, over a token folder.

    Attributes:
      graph: the graph of an evaluation step, its layers apart.
      held_out: the batches.
    """

    graph: Graph
    held_out: HeldOutBatches

    @classmethod
    def of(
        cls, model: OpenedModel, graph: Graph, folder: TokenFolder, spec: EvaluationSpec
    ) -> Tracing:
        """Return the evaluation of `graph`, of `model`, over a folder.

        Raises:
          InputError: the folder does not suit the model.
        """
        recipe = evaluation_recipe(graph, folder, spec)
        program = eval_graph(graph, replace(recipe, run=replace(recipe.run, rolled=False)))
        batches = open_batches(recipe.data, facts_of(model, program))
        return cls(program, next(iter(batches.evaluations.values())))

    def run(
        self, model: OpenedModel, wanted: Callable[[str], bool], graph: Graph | None = None
    ) -> Iterator[tuple[Arrays, Arrays, Graph]]:
        """Yield the outputs that are wanted, the batch, and the graph of those outputs.

        Args:
          model: whose weights are read.
          wanted: whether an output is, by its name.
          graph: another one than that of the evaluation, with the same outputs.
        """
        bare = clone(self.graph if graph is None else graph)
        for name in list(bare.output_names):
            if not wanted(name):
                bare.drop_output(name)
        program = get_backend("xla").compile(bare)
        params = ReadOnce(OpenedModel(bare, model.name, model.checkpoint).params())
        keys = [n for n, v in bare.inputs.items() if v.type.dtype.kind == "key"]
        for number in range(self.held_out.batches):
            batch = self.held_out.batch(number)
            inputs = {n: batch[n] for n in bare.inputs if n in batch}
            inputs |= {name: np.zeros((), np.uint64) for name in keys}
            yield program.run(params, inputs), batch, bare


def traced(graph: Graph, tracer: str) -> Graph | None:
    """Return a copy of `graph` with the outputs of a tracing pass; None where it adds none."""
    copy, context = clone(graph), Context(allow_unmatched=True)
    done = run_pipeline(copy, Pipeline.parse(tracer), context=context)
    return copy if done.changed else None


def count_experts(chosen: Value) -> int:
    """Return the number of experts among which `chosen` was chosen."""
    return next(SlotsOp.of_node(node).experts for node in chosen.users if node.op.assigns_slots)


def is_token(value: Value, batch: Arrays) -> tuple[Array, Array]:
    """Return the ids of the tokens that a value is of, and which of them are no padding; flat."""
    decoder = value.graph.inputs.get("decoder_tokens")
    in_decoder = decoder is not None and set(decoder.type.sizes) <= set(value.type.sizes)
    prefix = "decoder_" if in_decoder else ""
    tokens = batch[f"{prefix}tokens"]
    real = batch.get(f"{prefix}segments", batch.get(f"{prefix}mask", np.ones_like(tokens)))
    return tokens.reshape(-1), np.asarray(real, bool).reshape(-1)


def evaluate(
    models: Annotated[Sequence[str], Spelling("MODEL…", complete="models")],
    *,
    data: Annotated[Sequence[str], Spelling("DIR")],
    sequence: SequenceLength = 512,
    batch: BatchSize = 8,
    batches: Amount = 64,
    dtype: ComputeType = "f32",
    load: Load = (),
) -> Report:
    """Evaluate models on token folders, in pairs.

    The second model and later ones are paired with the first. Texts have a loss, examples an exact
    match, labelled examples an accuracy and a macro F1.

    Args:
      models: Hugging Face folder, .gguf file, .moe graph, or run.
      data: Token folder; may be repeated.
      batches: Maximal number of batches of a folder.

    Example:
      moecc evaluate SmolLM2-135M run@best --data tokens/heldout
    """
    load_files(load)
    spec = EvaluationSpec(sequence, batch, batches, float_type(dtype))
    folders = {name: open_tokens(path) for name, path in _named(data)}
    raise_problems(
        Problem("a token folder is no model", name, hint=f"--data {name}")
        for name in models
        if Path(name, FACTS).is_file()
    )
    for name in models:  # a wrong one shows before the first is run
        with open_model(name, heads=None) as model:
            for folder in folders.values():
                objective = evaluation_recipe(model.graph, folder, spec).data.objective
                check_objective(model.graph, objective)
    results: list[ModelEvaluation] = []
    for name in models:
        sets = {}
        with open_model(name, heads=None) as model:
            for folder_name, folder in folders.items():
                with Bar(f"evaluating {name} on {folder_name}", unit_bytes=False) as bar:
                    sets[folder_name] = score_of(model, folder, spec, bar)
        first = results[0].sets if results else {}
        against = {}
        for folder_name in first:
            pair = first[folder_name].scores, sets[folder_name].scores
            if np.array_equal(pair[0].tokens, pair[1].tokens):
                against[folder_name] = paired_difference(*pair)
            else:
                say(f"remark: {name} predicts other tokens of {folder_name} than {models[0]}: "
                    "their losses are not paired")  # fmt: skip
        results.append(ModelEvaluation(name, sets, against))
    facts = {
        "sequence": sequence, "batch": batch, "dtype": spec.dtype.name,
        "models": [result.to_json() for result in results],
    }  # fmt: skip
    return Report("evaluate", facts, lambda: evaluation_text(results))
