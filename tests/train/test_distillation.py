"""Runs that are distilled from their source: where they begin, and go on after a kill."""

import json
import shutil

import pytest

from moecc.cli.main import main
from moecc.formats.run import saved_steps

pytest.importorskip("jax")
pytest.importorskip("orbax.checkpoint")

from .tiny import draw_weights, make_corpus, make_model

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
    assert main(["train", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
    return folder


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss.distill" in line]


def test_an_exact_model_begins_at_its_teacher(folder):
    first, second, third, last = steps_of(folder / "run")
    assert abs(first["loss.distill"]) < 1e-5 < second["loss.distill"]
    assert third["loss.distill.scaled"] == pytest.approx(third["loss.distill"] * 0.5 / 3, rel=1e-5)
    assert last["loss.distill.scaled"] == 0
    assert last["loss"] == pytest.approx(last["loss.cross_entropy"] + last.get("loss.auxiliary", 0))


def test_a_resumed_run_has_its_teacher_again(folder):
    run = folder / "killed"
    shutil.copytree(folder / "run", run)
    for saved in saved_steps(run):
        if saved.number > 2:
            (saved.folder / "step.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert steps_of(run)[-2:] == steps_of(folder / "run")[-2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        ["mesh.mesh=data=2,expert=2"],
        ["mesh.mesh=data=4", "mesh.partition=gspmd"],
    ],
)
def test_a_mesh_has_the_losses_of_one_device(folder, tmp_path, sets):
    words = [word for text in sets for word in ("--set", text)]
    recipe, run = str(folder / "recipe.toml"), tmp_path / "run"
    assert main(["train", recipe, "--out", str(run), *words]) == 0
    for ours, theirs in zip(steps_of(run), steps_of(folder / "run"), strict=True):
        for name in ("loss", "loss.distill", "loss.distill.scaled"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.start=random"], "random parameters have no source to learn from"),
        (["loss.distill=0", "loss.distill_steps=2"], "no effect where loss.distill is 0"),
        (["loss.distill=-1"], "0 or more"),
        (["loss.distil=1"], "did you mean 'distill'"),
    ],
)
def test_what_cannot_be_distilled(folder, capsys, settings, said):
    sets = [word for setting in settings for word in ("--set", setting)]
    out = folder / "refused"
    assert main(["train", str(folder / "recipe.toml"), "--out", str(out), *sets]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
