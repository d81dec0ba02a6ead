"""Experiments: what is declared, what results say, and a runner that goes on where it was."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

declared, verdicts, results_page, run = (
    importlib.import_module(name) for name in ("declared", "verdicts", "results_page", "run")
)

CLAIM = "experts help at equal tokens"


def line(arm: str, seed: int, loss: float, data: str = "sha256:0") -> dict[str, Any]:
    return {"experiment": "a", "arm": arm, "seed": seed, "loss": loss, "data": data}


def effect(dense: list[float], sparse: list[float], **of: Any) -> Any:
    lines = [line("dense", n, x) for n, x in enumerate(dense)]
    lines += [line("top-2", n, x, **of) for n, x in enumerate(sparse)]
    return verdicts.effect_of(lines, declared.declared()["a"], CLAIM)


def test_arms_are_recipes() -> None:
    from moecc.train.recipe_text import load_recipe

    for experiment in declared.declared().values():
        assert set(experiment.claims.values()) <= {
            (a, b) for a in experiment.arms for b in experiment.arms
        }
        for sets in experiment.arms.values():
            load_recipe(str(ROOT / "experiments" / "continue.toml"), list(sets))


def test_an_effect_is_paired_by_seed_and_its_interval_is_students() -> None:
    found = effect([1.5, 1.6, 1.7], [1.4, 1.49, 1.62])
    assert found.mean == pytest.approx(-0.29 / 3)
    assert found.half_width == pytest.approx(4.30 * 0.0152752 / 3**0.5, rel=1e-3)
    assert found.verdict is verdicts.Verdict.SHOWN
    assert effect([1.4, 1.49, 1.62], [1.5, 1.6, 1.7]).verdict is verdicts.Verdict.OPPOSITE
    assert effect([1.5, 1.6, 1.7], [1.3, 1.61, 1.7]).verdict is verdicts.Verdict.NOT_SHOWN
    assert effect([1.5, 1.6], [1.4, 1.5]).verdict is verdicts.Verdict.NOT_RUN
    # Other data are another experiment.
    assert effect([1.5, 1.6, 1.7], [1.4, 1.5, 1.6], data="sha256:1").values == ()


def test_what_learns_no_more_than_the_likelier_label_measures_nothing() -> None:
    task = declared.declared()["t"]
    claim = next(c for c in task.claims if c != task.measures)

    def said(*wrong: float) -> Any:
        lines = [
            line(arm, seed, x + seed / 1000) | {"experiment": "t"}
            for seed in range(3)
            for arm, x in zip(("all", "all but the experts", run.LIKELIER), wrong, strict=True)
        ]
        return verdicts.verdict_of(lines, task, claim)

    assert said(0.3, 0.2, 0.5) is verdicts.Verdict.SHOWN
    assert said(0.5, 0.4, 0.5) is verdicts.Verdict.NOT_MEASURABLE
    assert verdicts.verdict_of([], task, claim) is verdicts.Verdict.NOT_RUN


def test_the_likelier_label_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "task-rte" / "heldout"
    folder.mkdir(parents=True)
    (folder / "tokens.json").write_text('{"labels": [{"count": 30}, {"count": 10}]}')
    monkeypatch.setattr(run.Lab, "task", lambda self, name: tmp_path / f"task-{name}")
    monkeypatch.setattr(run, "data_digest", lambda folder: folder.name)
    found = run.Lab(tmp_path).arm(declared.declared()["t"], run.LIKELIER, 2)
    assert (found["loss"], found["held_out_tokens"], found["data"]) == (0.25, 40, "t-all-2")


def test_the_page_is_of_the_results() -> None:
    text = results_page.page(declared.read_results())
    assert results_page.PAGE.read_text("utf-8") == text, "run: make docs"
    lines = [line("dense", n, 1.5) | FACTS | {"recipe": f"dense {n}"} for n in range(3)]
    lines += [line("top-2", n, 1.4 + n / 1000) | FACTS | {"recipe": f"{n}"} for n in range(3)]
    made = results_page.page(lines)
    assert f"| a | {CLAIM} | −0.0990 ± 0.0025 | 3 | reproduced |" in made
    assert "| dense | 1.5000, 1.5000, 1.5000 | 1.5000 | 150 | 307,200 | 60 s |" in made
    assert "6 runs, 1.84 M tokens, 0.10 hours of processor time in all." in made


FACTS = {"steps": 150, "tokens": 307200, "processor_seconds": 60.0}


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def arm(self: Any, experiment: Any, name: str, seed: int) -> dict[str, Any]:
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
def test_an_arm_is_trained_and_measured(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_stacks_are_of_one_run(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    few = ("run.steps=2", "optimizer.warmup=0", "data.evaluate_batches=1", "data.batch=2",
           "data.seq=64")  # fmt: skip
    lab = run.Lab(tmp_path, tmp_path / "results", few)
    experiment = declared.declared()["h"]
    found = {arm: lab.arm(experiment, arm, 0) for arm in experiment.arms}
    assert found["encoder"]["data"] == found["decoder"]["data"]
    assert found["encoder"]["loss"] != found["decoder"]["loss"]
    for line in found.values():
        assert 0 < line["loss"] <= 1
        assert 0 <= line["by_chance"] <= line["explained"] <= 1


@pytest.mark.parametrize(("name", "file", "text", "expected"), [
    ("subjectivity", "plot.tok.gt9.5000", "a plot\n\n", [("a plot", "o")]),
    ("qc", "test.txt", "NUM:dist How far ?\n", [("How far ?", "n")]),
    ("rte", "rte1_dev.xml", '<c><pair value="TRUE"><t>a b</t>\n<h>b</h></pair></c>',
     [("b | a b", "y")]),
])  # fmt: skip
def test_tasks_are_texts_with_letters(
    tmp_path: Path, name: str, file: str, text: str, expected: list[tuple[str, str]]
) -> None:
    tasks = importlib.import_module("tasks")
    with pytest.raises(FileNotFoundError, match="is at https"):
        list(tasks.records(name, tmp_path))
    empty = "<c/>" if name == "rte" else ""
    for one in tasks.TASKS[name].files:
        (tmp_path / one).write_text(text if one == file else empty)
    found = [(record["text"], record["label"]) for record in tasks.records(name, tmp_path)]
    assert found == expected


def test_curves_are_paired_by_seed_and_step(tmp_path: Path) -> None:
    experiment = declared.declared()["b"]
    lines = [
        {**line(arm, seed, 1.0), **FACTS, "experiment": "b",
         "curve": [2.0 + seed - (n + seed / 100) * (step > 1) / 10 for step in range(1, 41)]}
        for n, arm in enumerate(experiment.arms)
        for seed in range(3)
    ]  # fmt: skip
    lines.append({**lines[0], "seed": 3})
    early = "\n".join(results_page._early(experiment, lines))
    assert f"| carried | {' | '.join(['−0.1000 ± 0.0000'] * 4)} |" in early
    figure = importlib.import_module("curves_figure")
    assert {*figure.curves_of(experiment, lines)["reset"]} == {0, 1, 2}
    for name in ("one.svg", "two.svg"):
        figure.draw_curves(experiment, lines, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "step after the switch" in (tmp_path / "one.svg").read_text("utf-8")
