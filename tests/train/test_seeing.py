"""Alarms, series of a journal, the page of a report, and what trackers are given."""

import json
import re
import shutil

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.formats.run import LINEAGE_SCHEMA
from moecc.train.events import (
    DEAD_STEPS,
    Stepped,
    StepWork,
    TensorBoard,
    Watch,
    tracked,
)
from moecc.train.run import MOST_POINTS, create_run, read_run

from .tiny import write_lines

LAYER = "metric.layers.1.ffn"


def metrics(step, loads, entropy=1.3):
    return {"loss": 4.0 / step, f"{LAYER}.loads": loads, f"{LAYER}.entropy": entropy}


def test_a_dead_expert_is_seen_once_and_again_after_it_lived():
    watch, alarms = Watch(), []
    for step in range(1, 3 * DEAD_STEPS + 2):
        alive = step == 2 * DEAD_STEPS - 5
        alarms += watch(step, metrics(step, [0.5, 0.5 * alive, 0.5, 0.0]))
    steps = {n: [a.step for a in alarms if f"expert {n} " in a.fault] for n in (1, 3)}
    assert steps == {1: [DEAD_STEPS, 3 * DEAD_STEPS - 5], 3: [DEAD_STEPS]}
    assert {a.layer for a in alarms} == {"layers.1.ffn"}


@pytest.fixture
def run(tmp_path):
    """A run of 1,200 steps with two experts, the second of which dies."""
    folder = tmp_path / "run <1>"
    stage = {"source": "model", "pipeline": "upcycle", "recipe": "sha256:0123456789abcdef"}
    create_run(
        folder, recipe="", graph="", lineage={"schema": LINEAGE_SCHEMA, "stages": [stage]},
        source={"config.json": b"{}"},
    )  # fmt: skip
    lines = [
        {"step": s, "tokens": 8 * s, **metrics(s, [1.0, 0.0] if s > 900 else [0.5, 0.5])}
        for s in range(1, 1201)
    ]
    last = {"step": 1200, "held_out": {"a": 2.0, "b": 3.0}, "spread": {"layers.1.ffn": [1, 2]}}
    write_lines(folder / "metrics.jsonl", *lines, last)
    return folder


def test_series_of_a_journal(run):
    found = read_run(run)
    assert found.layers == ["layers.1.ffn"]
    loss = found.scalar("loss")
    assert len(loss.steps) == MOST_POINTS
    assert loss.values[0] == pytest.approx(3.0)  # of steps 1 and 2
    loads = found.of_layer("layers.1.ffn", "loads")
    assert loads.values.shape == (MOST_POINTS, 2)
    assert found.held_out["b"].values.tolist() == [3.0]
    assert found.spread("layers.1.ffn").values.tolist() == [[1.0, 2.0]]
    assert found.scalar("nothing") is None
    assert [a.step for a in found.alarms()] == [900 + DEAD_STEPS]


def test_the_pace_of_a_run_is_that_of_steps_that_compiled_nothing(run):
    assert read_run(run).facts["seconds a step"] == "not measured"
    lines = [{"step": 1, "seconds": 9.0, "compiles": True}, {"step": 2, "saved_seconds": 7.0}]
    lines += [{"step": s, "seconds": s / 10, "planned_seconds": 0.25} for s in (2, 3, 4)]
    write_lines(run / "speed.jsonl", *lines)
    assert read_run(run).facts["seconds a step"] == "0.3, planned 0.25"
    write_lines(run / "speed.jsonl", {"step": 1, "seconds": "soon"})
    with pytest.raises(InputError, match="not a line of a journal"):
        read_run(run)


def test_the_work_of_a_step_is_compared_with_peak_and_plan():
    assert StepWork(6e9).figures(2.0) == {"flops_per_second": 3e9}
    figures = StepWork(6e9, 12e9, 1.5).figures(2.0)
    assert figures == {"flops_per_second": 3e9, "mfu": 0.25, "planned_seconds": 1.5}


def test_what_is_no_run_or_made_no_step_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="not the folder of a run"):
        read_run(tmp_path)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has made no step"):
        read_run(run)


def test_the_page_is_whole_and_loads_nothing(run, tmp_path, moecc):
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    done = moecc("report", run, "--html", page, "--format", "json")
    assert done.code == 0
    told = done.json()
    assert (told["schema"], told["html"]) == ("moecc.report/1", str(page))
    assert [facts["steps"] for facts in told["runs"].values()] == ["1,200"]
    text = page.read_text("utf-8")
    without = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "<title>run &lt;1&gt;</title>" in text
    assert "expert 1 got no row for 50 steps" in without
    assert "Held-out text" in without
    assert not re.search(r"""(src|href)=["']?http""", without)
    assert text.count('<div class="figure">') >= 6
    assert moecc("report", run, "--html", page).code == 1


def test_runs_of_one_name_are_told_apart(run, tmp_path, moecc):
    pytest.importorskip("plotly")
    runs = [run, shutil.copytree(run, tmp_path / "other" / run.name)]
    done = moecc("report", *runs, run, "--html", tmp_path / "page.html", "--format", "json")
    assert done.code == 0
    assert list(done.json()["runs"]) == [str(path) for path in runs]


JOURNALS = {
    "step": {"step": "1", "loss": 1.0},
    "tokens": {"step": 1, "loss": 1.0, "tokens": []},
    "loss": {"step": 1, "loss": {"a": 1}},
    "large": {"step": 1, "loss": 10**401},
    "loads": {"step": 1, "loss": 1.0, f"{LAYER}.loads": 0.5},
    "held out": {"step": 1, "held_out": [1.0]},
    "spread": {"step": 1, "spread": {"layers.1.ffn": 1.0}},
}


@pytest.mark.parametrize("line", JOURNALS.values(), ids=JOURNALS)
def test_a_stranger_s_journal_is_a_message(run, moecc, line):
    write_lines(run / "metrics.jsonl", {"step": 1, **metrics(1, [0.5, 0.5])}, line)
    done = moecc("report", run, "--html", run.parent / "a.html")
    assert (done.code, "metrics.jsonl:2" in done.err) == (1, True), done.err


@pytest.mark.parametrize("stages", [None, [], [1], [{"recipe": 1}], [{"tokens": "8"}]])
def test_a_stranger_s_lineage_is_a_message(run, moecc, stages):
    (run / "lineage.json").write_text(json.dumps({"schema": LINEAGE_SCHEMA, "stages": stages}))
    done = moecc("report", run, "--html", run.parent / "a.html")
    assert (done.code, "lineage.json: stages" in done.err) == (1, True), done.err


def test_event_files_have_what_passed_by(tmp_path):
    pytest.importorskip("tensorboardX")
    events = [Stepped(s, {"loss": 1.0 / s}, s, 0.1) for s in range(1, 5)]
    assert list(tracked(events, [TensorBoard(tmp_path, 0)], 2)) == events
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert data.count(b"train/loss") == 2
    while data:  # records of a length, its checksum, as many bytes, and their checksum
        end = 16 + int(np.frombuffer(data[:8], np.uint64)[0])
        record, data = data[:end], data[end:]
        # One event for all values of a step: each passes a queue between processes.
        assert (b"train/loss" in record) == (b"train/seconds" in record)
