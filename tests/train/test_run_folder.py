"""Run folders: whole or absent, steps complete or none, and models to every command."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from moecc.errors import CheckError, InputError
from moecc.formats.manifest import seal
from moecc.formats.run import (
    LINEAGE_SCHEMA,
    RunCheckpoint,
    check_step,
    choose_step,
    is_run,
    saved_steps,
    split_reference,
)
from moecc.formats.writer import JOURNAL_NAME
from moecc.jobs.training import exported
from moecc.train.recipe import RunSection
from moecc.train.run import (
    begin_step,
    create_run,
    file_records,
    finish_step,
    keep_steps,
    locked_run,
    remove_incomplete,
    write_part,
)

FILES = {"config.json": b"{}", "additional_chat_templates/a.jinja": b"x"}


def create(folder, source=FILES):
    lineage = {"schema": LINEAGE_SCHEMA}
    create_run(folder, recipe="[model]\n", graph="moe 1\n", lineage=lineage, source=source)
    return folder


@pytest.fixture
def run(tmp_path):
    return create(tmp_path / "run")


def test_only_the_beginning_of_a_run_is_removed_unasked(tmp_path):
    run, partial = tmp_path / "run", tmp_path / ".run.moecc-partial"
    (partial / "source").mkdir(parents=True)
    create(run)
    assert not partial.exists()
    assert (run / "recipe.toml").exists()
    shutil.rmtree(run)
    partial.mkdir()
    (partial / JOURNAL_NAME).write_text("{}")
    with pytest.raises(InputError, match="killed and left its partial output"):
        create(run)
    assert (partial / JOURNAL_NAME).exists()
    assert not run.exists()


def finish(run, step, loss=None):
    finish_step(run, step, {"loss": loss, "tokens": step, "left_out": [], "tensors": {}})


def save(run, step, loss=None):
    """Save a step of a run and return it."""
    state = begin_step(run, step)
    state.mkdir()
    (state / "data").write_bytes(b"array")
    finish(run, step, loss)
    return choose_step(run, "last")


def test_each_process_hashes_what_it_wrote(run, monkeypatch):
    state = begin_step(run, 1)
    for name in ("d/x", "ocdbt.process_1/d/y", "ocdbt.process_2/d/z"):
        (state / name).parent.mkdir(parents=True)
        (state / name).write_bytes(name.encode())
    for process in (1, 2):
        write_part(run, 1, process)
    hashed = []

    def noted(files):
        hashed.extend(files)
        return file_records(files)

    monkeypatch.setattr("moecc.train.run.file_records", noted)
    finish(run, 1)
    assert [name for name in hashed if "d" in name.split("/")] == ["d/x"]
    (step,) = saved_steps(run)
    assert sorted(step.facts.files) == ["d/x", "ocdbt.process_1/d/y", "ocdbt.process_2/d/z"]
    assert sorted(p.name for p in step.folder.iterdir()) == ["state", "step.json"]
    check_step(run, step)


def numbers(run):
    return [s.number for s in saved_steps(run)]


def test_references_name_a_run_and_a_step(run, tmp_path):
    assert is_run(run)
    assert split_reference(str(run)) == (str(run), "last")
    assert split_reference(f"{run}@best") == (str(run), "best")
    assert split_reference(f"{tmp_path}@3") is None
    assert split_reference(str(tmp_path)) is None


def test_steps_are_chosen_by_number_last_and_best(run):
    with pytest.raises(InputError, match="no checkpoint yet"):
        choose_step(run, "last")
    for step, loss in ((10, 2.0), (20, 1.5), (30, None)):
        save(run, step, loss)
    assert choose_step(run, "last").number == 30
    assert choose_step(run, "best").number == 20
    assert choose_step(run, "10").number == 10
    with pytest.raises(InputError, match=r"best, last, or one of the steps 10, 20, 30"):
        choose_step(run, "11")


def test_the_last_steps_and_the_best_are_kept(run):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, None)):
        save(run, step, loss)
        keep_steps(run, 2)
    assert numbers(run) == [2, 4, 5]


def test_a_step_without_its_facts_is_none_and_is_removed(run):
    save(run, 1)
    begin_step(run, 2).mkdir()
    (run / "steps" / "7.orbax-tmp").mkdir()
    assert numbers(run) == [1]
    remove_incomplete(run)
    assert [p.name for p in (run / "steps").iterdir()] == ["1"]


@pytest.mark.parametrize("file", ["steps/1/state/data", "graph.moe", "source/config.json"])
def test_a_changed_file_is_found(run, file):
    step = save(run, 1)
    check_step(run, step)
    (run / file).write_bytes(b"other")
    with pytest.raises(CheckError, match=f"{Path(file).name}: the file differs"):
        check_step(run, step)


def test_a_changed_digest_and_a_missing_file_are_found(run):
    step = save(run, 1)
    (step.state / "data").unlink()
    with pytest.raises(CheckError, match="'data' is missing") as caught:
        check_step(run, step)
    assert "another checkpoint of the run" in str(caught.value.problems[0].hint)
    facts = step.folder / "step.json"
    facts.write_text(facts.read_text().replace('"tokens": 1', '"tokens": 2'))
    with pytest.raises(CheckError, match="seal"):
        check_step(run, saved_steps(run)[0])


FORMS = {
    "tokens": "8",
    "left_out": [1, "2"],
    "loss": [1.0],
    "tensors": [],
    "files": {"data": {"size_bytes": "5", "sha256": "0" * 64}},
    "run_files": {"graph.moe": ["0" * 64]},
}


@pytest.mark.parametrize(("key", "value"), FORMS.items(), ids=FORMS)
def test_a_stranger_s_step_is_a_message(run, key, value):
    save(run, 1, loss=2.0)
    rewrite(run, **{key: value})
    for read in (lambda: check_step(run, saved_steps(run)[0]), lambda: choose_step(run, "best")):
        with pytest.raises(InputError, match=rf"step\.json: {key}[.:]"):
            read()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../../outside"])
def test_no_file_outside_of_the_run_is_hashed(run, monkeypatch, name):
    save(run, 1)
    monkeypatch.setattr("moecc.formats.run.file_records", lambda _: pytest.fail("it was hashed"))
    rewrite(run, run_files={name: {"size_bytes": 6, "sha256": "0" * 64}}, files={})
    check_refused(run, "a name of a file in the folder")


def check_refused(run, message):
    """Check that the last step is neither found sound nor read."""
    step = choose_step(run, "last")
    for read in (check_step, RunCheckpoint):
        with pytest.raises(InputError, match=message):
            read(run, step)


@pytest.mark.parametrize("part", ["source", "steps/1/state", "steps/1", "steps/1/state/data"])
def test_a_link_out_of_the_run_is_refused(run, part):
    check_step(run, save(run, 1))
    (run / part).rename(run.parent / "outside")
    (run / part).symlink_to(run.parent / "outside")
    check_refused(run, "link that leaves its folder")


def rewrite(run, **changes):
    """Replace values of step.json, as a stranger could, the seal included."""
    path = run / "steps/1/step.json"
    facts = {**json.loads(path.read_text()), **changes}
    facts.pop("seal")
    path.write_bytes(seal(json.dumps(facts, indent=1).encode().removesuffix(b"\n}")))


def test_a_moved_step_is_refused(run):
    save(run, 1)
    (run / "steps" / "1").rename(run / "steps" / "3")
    with pytest.raises(InputError, match="or was moved"):
        _ = saved_steps(run)[0].facts


def test_one_process_trains_a_run(run):
    with (
        locked_run(run),
        pytest.raises(InputError, match="another process trains this run"),
        locked_run(run),
    ):
        pass
    with locked_run(run):
        pass


def test_a_run_is_made_as_a_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError):
        create(out, source={"config.json": tmp_path / "absent"})
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(InputError, match=r"not empty(?s:.*)moecc train --resume RUN"):
        create(out)


@pytest.mark.parametrize(("stage", "steps"), [({}, [4]), ({"from_step": 4}, [])])
def test_an_export_that_a_kill_prevented_is_made_up_for(tmp_path, monkeypatch, stage, steps):
    """But not of the step of another run, which a fork begins with."""
    (tmp_path / "steps" / "4").mkdir(parents=True)
    (tmp_path / "steps" / "4" / "step.json").touch()
    lineage = {"schema": LINEAGE_SCHEMA, "stages": [stage]}
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))

    def export(job, step):
        out = tmp_path / "exports" / str(step)
        out.mkdir(parents=True)
        return out

    monkeypatch.setattr("moecc.jobs.training.export_step", export)
    recipe = SimpleNamespace(run=RunSection(6, export_steps=2))
    job = SimpleNamespace(run=tmp_path, recipe=recipe, store=None)
    assert [event.step for event in exported(job, [])] == steps
    assert list(exported(job, [])) == []
