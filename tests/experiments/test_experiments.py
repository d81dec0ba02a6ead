"""Experiments: what is declared, what results say, and a runner that goes on where it was."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

declared, verdicts, results_page, run = (
    importlib.import_module(name) for name in ("declared", "verdicts", "results_page", "run")
)

CLAIM = "experts help at equal tokens"


def line(arm, seed, loss, data="sha256:0"):
    return {"experiment": "a", "arm": arm, "seed": seed, "loss": loss, "data": data}


def effect(dense, sparse, **of):
    lines = [line("dense", n, x) for n, x in enumerate(dense)]
    lines += [line("top-2", n, x, **of) for n, x in enumerate(sparse)]
    return verdicts.effect_of(lines, declared.declared()["a"], CLAIM)


def test_an_effect_is_paired_by_seed_and_its_interval_is_students():
    found = effect([1.5, 1.6, 1.7], [1.4, 1.49, 1.62])
    assert found.mean == pytest.approx(-0.29 / 3)
    assert found.half_width == pytest.approx(4.30 * 0.0152752 / 3**0.5, rel=1e-3)
    assert found.verdict is verdicts.Verdict.SHOWN
    assert effect([1.4, 1.49, 1.62], [1.5, 1.6, 1.7]).verdict is verdicts.Verdict.OPPOSITE
    assert effect([1.5, 1.6, 1.7], [1.3, 1.61, 1.7]).verdict is verdicts.Verdict.NOT_SHOWN
    assert effect([1.5, 1.6], [1.4, 1.5]).verdict is verdicts.Verdict.NOT_RUN
    # Other data are another experiment.
    assert effect([1.5, 1.6, 1.7], [1.4, 1.5, 1.6], data="sha256:1").values == ()


def test_what_learns_no_more_than_the_likelier_label_measures_nothing():
    task = declared.declared()["t"]
    claim = next(c for c in task.claims if c != task.measures)

    def said(*wrong):
        lines = [
            line(arm, seed, x + seed / 1000) | {"experiment": "t"}
            for seed in range(3)
            for arm, x in zip(("all", "all but the experts", run.LIKELIER), wrong, strict=True)
        ]
        return verdicts.verdict_of(lines, task, claim)

    assert said(0.3, 0.2, 0.5) is verdicts.Verdict.SHOWN
    assert said(0.5, 0.4, 0.5) is verdicts.Verdict.NOT_MEASURABLE
    assert verdicts.verdict_of([], task, claim) is verdicts.Verdict.NOT_RUN


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    asked = []

    def arm(self, experiment, name, seed):
        asked.append((name, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return line(name, seed, 1.0)

    monkeypatch.setattr(run.Lab, "arm", arm)
    few = declared.declared()["a"].only(CLAIM)
    lab = run.Lab(tmp_path, tmp_path / "results")
    with pytest.raises(KeyboardInterrupt):
        run.run_all(lab, [few], (0, 1), 60)
    run.run_all(lab, [few], (0, 1), 60)
    assert asked == [("dense", 0), ("top-2", 0), ("dense", 1), ("dense", 1), ("top-2", 1)]
    assert len(declared.read_results(tmp_path / "results")) == 4


@pytest.mark.slow
def test_an_arm_is_trained_and_measured(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    few = ("run.steps=6", "run.evaluate_steps=0", "optimizer.warmup=0", "data.evaluate_batches=1",
           "data.batch=4", "data.seq=64", "optimizer.schedule=constant",
           "optimizer.decay_steps=0")  # fmt: skip
    lab = run.Lab(tmp_path, tmp_path / "results", few)
    experiment = declared.declared()["b"]
    found = lab.arm(experiment, "carried", 1)
    assert (found["steps"], found["experiment"], found["seed"]) == (6, "b", 1)
    assert found["held_out_tokens"] > 10_000
    assert len(found["curve"]) == 6
    # A second time it is there, and only evaluated.
    assert lab.arm(experiment, "carried", 1)["loss"] == found["loss"]


@pytest.mark.parametrize(("name", "file", "text", "expected"), [
    ("subjectivity", "plot.tok.gt9.5000", "a plot\n\n", [("a plot", "o")]),
    ("qc", "test.txt", "NUM:dist How far ?\n", [("How far ?", "n")]),
    ("rte", "rte1_dev.xml", '<c><pair value="TRUE"><t>a b</t>\n<h>b</h></pair></c>',
     [("b | a b", "y")]),
])  # fmt: skip
def test_tasks_are_texts_with_letters(tmp_path, name, file, text, expected):
    tasks = importlib.import_module("tasks")
    with pytest.raises(FileNotFoundError, match="is at https"):
        list(tasks.records(name, tmp_path))
    empty = "<c/>" if name == "rte" else ""
    for one in tasks.TASKS[name].files:
        (tmp_path / one).write_text(text if one == file else empty)
    found = [(record["text"], record["label"]) for record in tasks.records(name, tmp_path)]
    assert found == expected
