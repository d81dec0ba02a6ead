"""Runs that are distilled from their source: where they begin, and go on after a kill."""

import shutil

import pytest

pytest.importorskip("orbax.checkpoint")

from .tiny import (
    draw_weights,
    forget,
    journal,
    make_corpus,
    make_model,
    resume,
    set_options,
    train,
)

RECIPE = """
[model]
source = "model"
pipeline = "upcycle{experts=2 top-k=2}"
[data]
batch = 4
seq = 8
train = [{ tokens = "tokens/train" }]
[optimizer]
rate = 3e-3
[loss]
distill = 0.5
distill_steps = 3
[run]
steps = 4
save_steps = 2
keep = 9
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    draw_weights(make_model(folder / "model"))
    make_corpus(folder / "tokens")
    (folder / "recipe.toml").write_text(RECIPE)
    train(folder / "recipe.toml", folder / "run")
    return folder


def test_an_exact_model_begins_at_its_teacher(folder):
    first, second, third, last = journal(folder / "run")
    assert abs(first["loss.distill"]) < 1e-5 < second["loss.distill"]
    assert third["loss.distill.scaled"] == pytest.approx(third["loss.distill"] * 0.5 / 3, rel=1e-5)
    assert last["loss.distill.scaled"] == 0
    assert last["loss"] == pytest.approx(last["loss.cross_entropy"] + last.get("loss.auxiliary", 0))


def test_a_resumed_run_has_its_teacher_again(folder):
    run = shutil.copytree(folder / "run", folder / "killed")
    resume(forget(run, 2))
    assert journal(run) == journal(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["mesh.mesh=data=2,expert=2"],
        ["mesh.mesh=data=4", "mesh.partition=gspmd"],
    ],
)
def test_a_mesh_has_the_losses_of_one_device(folder, tmp_path, settings):
    run = train(folder / "recipe.toml", tmp_path / "run", *settings)
    for ours, theirs in zip(journal(run), journal(folder / "run"), strict=True):
        for name in ("loss", "loss.distill", "loss.distill.scaled"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.start=random"], "random parameters have no source to learn from"),
        (["loss.distill=0", "loss.distill_steps=2"], "no effect where loss.distill is 0"),
        (["loss.distill_steps=5"], "at most steps = 4, or 0 for all of them"),
        (["loss.distill=-1"], "0 or more"),
        (["loss.distil=1"], "did you mean 'distill'"),
    ],
)
def test_what_cannot_be_distilled(folder, moecc, settings, said):
    out = folder / "refused"
    done = moecc("train", folder / "recipe.toml", "--out", out, *set_options(*settings))
    assert (done.code, said in done.err) == (2, True), done.err
    assert not out.exists()
