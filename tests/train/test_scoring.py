"""Paired differences, F1, and the labels of examples."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from moecc.jobs import evaluate as evaluation
from moecc.model.open import open_model
from moecc.train.objectives import IGNORED
from moecc.train.rows import LabelChoices
from moecc.train.scoring import (
    TokenScores,
    UnitScores,
    by_document,
    macro_f1,
    paired_difference,
    student_quantile,
)
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.folder import open_tokens

from .tiny import draw_weights, make_model, masked_model, tokenize, tokens_of, write_lines


def rows(losses, tokens):
    return UnitScores(losses, tokens, np.zeros_like(tokens))


def test_a_difference_by_hand():
    """Rows of equal length: the mean of differences, and the standard error of a mean."""
    tokens = np.full(6, 10)
    first = rows(np.array([20.0, 22, 18, 25, 21, 19]), tokens)
    other = rows(first.losses + np.array([1.0, 2, 3, 1, 2, 3]), tokens)
    difference = paired_difference(first, other)
    error = np.std([0.1, 0.2, 0.3] * 2, ddof=1) / np.sqrt(6)
    half = student_quantile(5) * error
    assert difference.mean == pytest.approx(0.2)
    halves = (difference.mean - difference.low, difference.high - difference.mean)
    assert halves == pytest.approx((half, half))


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (60, 2.0003)]
)
def test_quantiles_are_those_of_the_table(degrees, quantile):
    assert student_quantile(degrees) == pytest.approx(quantile, rel=0.01)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(20, 60, 25)
        noise = rng.normal(0.1, 0.3, 25) * tokens
        first = rows(rng.normal(3, 1, 25) * tokens, tokens)
        difference = paired_difference(first, rows(first.losses + noise, tokens))
        hits += difference.low <= 0.1 <= difference.high
    assert 0.92 <= hits / 400 <= 0.98


def test_a_document_is_one_unit_in_however_many_rows_it_is():
    losses = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 0.0]])
    counted = losses > 0
    scores = TokenScores(losses, counted, counted & (losses > 3))
    documents = np.array([[0, 2, 2], [2, 1, -1]])
    units = by_document([(scores, documents), (scores, documents)], 3)
    assert units.losses.tolist() == [2, 32, 28]
    assert units.tokens.tolist() == [2, 2, 6]
    assert units.hits.tolist() == [0, 2, 4]


def test_f1_by_hand():
    answers, guesses = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 2])
    assert macro_f1(answers, guesses, 4) == pytest.approx((4 / 6 + 2 / 4 + 1) / 3)


def test_each_example_is_repeated_with_each_label():
    ids = np.array([1, 2, 9, 3, 7], np.int32)
    labels = [SimpleNamespace(tokens=tokens) for tokens in ((9,), (7, 8))]
    folder = SimpleNamespace(
        facts=SimpleNamespace(labels=labels), starts=np.array([0, 3, 5]),
        completions=np.array([2, 1]), labels=np.array([0, 1]),
        ids=lambda start, stop: ids[start:stop],
    )  # fmt: skip
    choices = LabelChoices(folder, np.array([0, 1]))
    documents = [choices.ids(a, b).tolist() for a, b in pairwise(choices.starts)]
    assert documents == [[1, 2, 9], [1, 2, 7, 8], [3, 9], [3, 7, 8]]
    assert choices.completions.tolist() == [2, 2, 1, 1]
    assert choices.answers.tolist() == [0, 1]


class SaysNo:
    """A backend to whose models every letter of ``yes`` costs a nat, and nothing else."""

    def scorer(self, graph, params, *, dtype):
        def score(batch):
            counted = batch["targets"] != IGNORED
            return TokenScores(np.isin(batch["targets"], list(b"yes")) * 1.0, counted, counted)

        return score


def test_accuracy_is_of_the_examples_whose_loss_is_measured(tmp_path, monkeypatch, capsys):
    """A part of a folder that is sorted by label, of which the first ones would be all alike."""
    records = [{"prompt": f"is it {n}? ", "completion": answer}
               for n, answer in enumerate(["yes"] * 20 + ["no"] * 20)]  # fmt: skip
    source = write_lines(tmp_path / "sorted.jsonl", *records)
    tokenize(tmp_path / "tokens", source, format=DocumentFormat("labelled"))
    monkeypatch.setattr(evaluation, "backend_with", lambda kind: SaysNo())
    spec = evaluation.EvaluationSpec(seq=12, batch=4, batches=4)
    with open_model(str(draw_weights(make_model(tmp_path / "model")))) as model:
        score = evaluation.score_of(model, open_tokens(tmp_path / "tokens"), spec)
    are_yes = score.scores.losses > 0
    assert len(are_yes) == 16
    assert 0 < are_yes.mean() < 1
    assert score.accuracy == 1 - are_yes.mean()
    assert "10 examples are cut" in capsys.readouterr().err


def test_masked_tokens_are_predicted_by_the_head_of_the_checkpoint(tmp_path, monkeypatch):
    data, compiled = tokens_of("some text of letters", tmp_path / "tokens"), []

    class Compiles(SaysNo):
        def scorer(self, graph, params, *, dtype):
            compiled.append(graph)
            return super().scorer(graph, params, dtype=dtype)

    monkeypatch.setattr(evaluation, "backend_with", lambda kind: Compiles())
    evaluation.evaluate([str(masked_model(tmp_path / "model"))], data=[str(data)], sequence=16)
    assert "cls.predictions.bias" in compiled[0].params
    assert compiled[0].output_names == ["logits"]


def test_losses_of_other_tokens_are_not_paired(tmp_path, monkeypatch, capsys):
    """A decoder predicts every token, an encoder those that are masked."""
    data = tokens_of("a text of so many letters, and an end", tmp_path / "tokens")
    models = [
        str(draw_weights(make_model(tmp_path / golden, golden)))
        for golden in ("llama_gqa", "bert_square")
    ]
    monkeypatch.setattr(evaluation, "backend_with", lambda kind: SaysNo())
    report = evaluation.evaluate(models, data=[str(data)], sequence=16, batch=2)
    first, second = (model["sets"]["tokens"] for model in report.data["models"])
    assert first["tokens"] > second["tokens"] > 0
    assert second["against_first"] is None
    assert "predicts other tokens of tokens" in capsys.readouterr().err
