"""``moecc train`` from recipe to run, and what other commands make of a run."""

import json
import shutil

import pytest

from moecc import open as open_model
from moecc.cli.main import main
from moecc.errors import InputError
from moecc.formats.run import saved_steps
from moecc.train.run import read_run

pytest.importorskip("orbax.checkpoint")

from .tiny import forget, journal, make_model, make_recipe, read_lines, set_options

RUN = "steps = 6\nsave_steps = 2\nevaluate_steps = 3\nkeep = 9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recipe, and a run of it that went to its end."""
    folder = tmp_path_factory.mktemp("train")
    recipe = make_recipe(folder, RUN)
    (folder / ".run.moecc-partial" / "source").mkdir(parents=True)  # a training was killed here
    options = ["--machine", "cpu:1", "--profile", "2"]
    assert main(["train", str(recipe), "--out", str(folder / "run"), *options]) == 0
    make_model(folder / "small", vocab_size=100)
    shutil.copytree(folder / "tokens" / "train", folder / "other")
    path = folder / "other" / "tokens.json"
    facts = json.loads(path.read_text()) | {"tokenizer_digest": "sha256:" + "1" * 64}
    path.write_text(json.dumps(facts))
    return folder


def test_a_run_measures_its_speed_and_is_traced(folder):
    run = folder / "run"
    steps = [line for line in read_lines(run / "speed.jsonl") if "seconds" in line]
    assert len(steps) == 6
    work = [step["flops_per_second"] * step["seconds"] for step in steps]
    assert work == pytest.approx(work[:1] * 6, rel=1e-2)
    assert all(0 < step["mfu"] < 1 for step in steps)
    assert read_run(run).facts["seconds a step"].endswith("of the peak")
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size


def test_a_negative_number_of_traced_steps_is_rejected(moecc, tmp_path):
    run = tmp_path / "run"
    code, _, err = moecc("train", "recipe:upcycle", "--out", run, "--profile", "-1")
    assert code == 2
    assert "-1 is not in the range" in err
    assert not run.exists()


def killed(folder, step, name):
    """Return a copy of the run as a kill after `step` may leave it."""
    run = forget(shutil.copytree(folder / "run", folder / name), step)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[: step + 1]) + b'{"step":9,"lo')
    return run


def test_a_run_has_what_its_layout_says(folder):
    run = folder / "run"
    assert {p.name for p in run.iterdir()} == {
        "recipe.toml", "lineage.json", "graph.moe", "source", "metrics.jsonl", "speed.jsonl",
        "steps", "profile",
    }  # fmt: skip
    assert [s.number for s in saved_steps(run)] == [2, 3, 4, 6]
    steps = [line for line in journal(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in journal(run) if "held_out" in line] == [3, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (run / "source" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("step", "option"), [pytest.param(0, "--resume", marks=pytest.mark.slow), (4, "--out")]
)
def test_a_resumed_run_is_the_run_that_was_not_killed(folder, moecc, step, option):
    whole, run = folder / "run", killed(folder, step, f"killed{step}{option}")
    recipe = [folder / "recipe.toml"] if option == "--out" else []
    code, _, err = moecc("train", *recipe, option, run)
    assert code == 0
    assert ("is a run already" in err) == (option == "--out")
    assert 'remark: 1 of 8 devices compute; mesh.mesh = "data=8" takes all' in err
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for ours, theirs in zip(saved_steps(run), saved_steps(whole), strict=True):
        assert ours.facts.tensors == theirs.facts.tensors
    assert moecc("verify", run, "--against", whole)[0] == 0
    assert moecc("verify", run)[0] == 0


def test_a_run_without_a_step_is_told_so(folder, moecc):
    words = ("--out", killed(folder, 0, "empty"), "--dry-run")
    code, _, err = moecc("train", folder / "recipe.toml", *words)
    assert (code, "is a run already, which has no step yet\n" in err) == (0, True)


def test_a_run_is_a_model(folder, moecc, tmp_path):
    run, out = folder / "run", tmp_path / "out"
    done = moecc("inspect", f"{run}@4", "--format", "json")
    assert done.code == 0
    tokens = next(saved.facts.tokens for saved in saved_steps(run) if saved.number == 4)
    assert 64 < tokens <= 128
    assert f"trained for 4 steps, {tokens} tokens" in done.json()["remarks"][0]
    assert moecc("generate", f"{run}@best", "--prompt", "moecc", "--tokens", 3)[0] == 0
    assert moecc.plan(run, "--machine", "cpu", "--sequence", 32, "--batch-tokens", 64)
    code, _, err = moecc("convert", run, out, "-p", "", "--to", "st_moe")
    assert (code, err) == (0, "")
    card = (out / "README.md").read_text()
    assert "not trained further" not in card
    assert "tokens of train, by the recipe sha256:" in card
    manifest = json.loads((out / "moecc_manifest.json").read_text())
    assert manifest["lineage"][-1]["steps"] == 6
    assert moecc("verify", out)[0] == 0
    # The story is not forgotten when the export is converted again.
    assert moecc("convert", out, tmp_path / "again", "-p", "", "--to", "st_moe")[0] == 0
    assert "up to step 6: " in (tmp_path / "again" / "README.md").read_text()


def flip(path, at):
    """Flip a bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_of_a_checkpoint_is_told(folder, moecc, tmp_path):
    """Of arrays, of what step.json says, and of what the run has for all its steps."""
    run, out = killed(folder, 6, "flipped"), tmp_path / "out"
    step, data = run / "steps" / "6", ["--data", folder / "tokens" / "heldout", "--batches", "1"]
    commands = [
        ("convert", run, out, "-p", "", "--to", "st_moe"),
        ("generate", run, "--prompt", "moecc", "--tokens", 1),
        ("evaluate", run, *data, "--sequence", "8"),
        ("train", "--resume", run),
    ]
    arrays = sorted(p for p in step.rglob("*") if p.parent.name == "d")
    largest = max(arrays, key=lambda p: p.stat().st_size)
    described = [step / "step.json", run / "graph.moe", run / "source" / "config.json"]
    cases = [(largest, 0.5, commands), (step / "state" / "_METADATA", 0.3, commands[:1])]
    cases += [(p, at, commands[n : n + 1]) for p in described for at, n in ((0.3, 0), (0.9, 3))]
    for path, at, affected in cases:
        before = path.read_bytes()
        flip(path, at)
        for command in affected:
            code, _, err = moecc(*command)
            assert (code, str(path) in err) == (1, True), (path, command, err)
            assert not out.exists()
        path.write_bytes(before)
    assert moecc(*commands[0])[0] == 0
    flip(largest, 0.5)
    recipe = (folder / "recipe.toml").read_text().replace("steps = 6", "steps = 8", 1)
    (folder / "longer.toml").write_text(recipe)
    fork = ("train", folder / "longer.toml", "--fork", run, "--out", tmp_path / "fork")
    assert moecc(*fork)[0] == 1
    assert moecc("verify", run)[0] == 3


def test_models_are_evaluated_on_held_out_text(folder, moecc):
    run, data = folder / "run", folder / "tokens" / "heldout"
    done = moecc("evaluate", f"{run}@3", run, "--data", data, "--sequence", 8, "--batch", 4,
                 "--batches", 1, "--format", "json")  # fmt: skip
    assert done.code == 0
    first, last = (model["sets"]["heldout"] for model in done.json()["models"])
    during = [line["held_out"]["heldout"] for line in journal(run) if "held_out" in line]
    assert [first["loss"], last["loss"]] == pytest.approx(during, rel=1e-5)
    assert first["against_first"] is None
    assert last["against_first"]["difference"] == pytest.approx(during[1] - during[0], rel=1e-3)
    code, out, _ = moecc("evaluate", run, "--data", data, "--sequence", "8", "--batches", "1")
    assert (code, "heldout" in out) == (0, True)


def test_all_models_are_opened_before_the_first_is_evaluated(folder, moecc, monkeypatch):
    monkeypatch.setattr("moecc.jobs.evaluate.score_of", lambda *_: pytest.fail("it was run"))
    data = folder / "tokens" / "heldout"
    code, _, err = moecc("evaluate", folder / "run", folder / "nowhere", "--data", data)
    assert code == 1
    assert "nowhere: there is no such file or folder" in err
    code, _, err = moecc("evaluate", folder / "run", data, "--data", data)
    assert (code, f"hint: --data {data}" in err) == (1, True)


def test_slow_batches_are_announced_before_the_first_is_scored(folder, moecc, monkeypatch):
    def stop(*_):
        raise InputError("stopped")

    monkeypatch.setattr("moecc.jobs.evaluate.SLOW_BATCH_FLOPS", 1e5)
    monkeypatch.setattr("moecc.jobs.evaluate.by_document", stop)
    words = ("evaluate", folder / "run", "--data", folder / "tokens" / "heldout", "--sequence", "8")
    code, _, err = moecc(*words)
    assert (code, "stopped" in err) == (1, True)
    assert "of 8 × 8 tokens" in err
    assert "of them attention's" in err


def test_a_run_may_be_named_relative_to_a_folder_beside_it(folder, monkeypatch):
    monkeypatch.chdir(folder / "tokens")
    near, far = (open_model(path).params() for path in ("../run", folder / "run"))
    name = next(iter(near))
    assert near[name].shape == far[name].shape


def test_another_recipe_is_rejected_with_what_may_differ(folder, moecc):
    text = (folder / "recipe.toml").read_text().replace("steps = 6", "steps = 7", 1)
    (folder / "seven.toml").write_text(text.replace('"model"', '"small"'))
    code, _, err = moecc("train", folder / "seven.toml", "--out", folder / "run")
    assert code == 1
    assert "but for [mesh] and local paths: model.source, tokens of [data]" in err
    assert "found: run.steps: 6 → 7\n" in err


@pytest.mark.slow
def test_a_fork_goes_on_under_another_recipe(folder, moecc):
    run, fork = folder / "run", folder / "fork"
    sets = set_options("optimizer.rate=1e-3", "run.evaluate_steps=0")
    code, _, err = moecc(
        "train", folder / "recipe.toml", "--fork", f"{run}@4", "--out", fork, *sets
    )
    assert (code, "error" in err) == (0, False)
    lines, before = journal(fork), journal(run)[5]
    assert [line["step"] for line in lines] == [5, 6, 6]
    # The same batch on the same state, before another rate shows.
    assert lines[0]["loss"] == before["loss"]
    assert lines[0]["rate"] != before["rate"]
    stages = json.loads((fork / "lineage.json").read_text())["stages"]
    assert [stage.get("from_step") for stage in stages] == [None, 4]
    assert stages[0]["steps"] == 4


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("optimizer.name=adafactor", "the run kept no such moments"),
        ("optimizer.groups=[{match='moe', from_step=2}]", "the run kept no such moments"),
        ("model.pipeline=''", "the model of a fork is that of the run"),
    ],
)
def test_a_fork_has_the_model_and_the_moments_of_the_run(folder, moecc, changed, says):
    """Of updates that begin at another step, nothing was counted."""
    code, _, err = moecc(
        "train", folder / "recipe.toml", "--fork", folder / "run@4", "--out", folder / "none",
        "--set", changed,
    )  # fmt: skip
    assert (code, says in err) == (1, True), err
    assert not (folder / "none").exists()


def test_a_run_that_diverged_is_a_run(folder, moecc):
    """A held-out loss that is not a number is none, and no step the best."""
    out = folder / "diverged"
    sets = set_options(
        "run.steps=3", "optimizer.rate=1e30", "run.save_steps=0", "run.evaluate_steps=0"
    )
    code, _, err = moecc("train", folder / "recipe.toml", "--out", out, *sets)
    assert (code, "held out heldout nan" in err) == (0, True)
    assert [step.loss for step in saved_steps(out)] == [None]


def test_another_recipe_is_refused_with_the_keys_that_differ(folder, moecc):
    run = killed(folder, 4, "edited")
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("rate = 0.003", "rate = 0.3"))
    code, _, err = moecc("train", "--resume", run)
    assert code == 1
    assert "optimizer.rate: 0.003 → 0.3" in err
    assert "--fork" in err
    sets = set_options("optimizer.rate=0.003", "run.steps=9")
    code, _, err = moecc("train", "--resume", run, *sets)
    assert code == 1
    assert "run.steps: 6 → 9" in err
    assert "optimizer.rate" not in err
    done = moecc("train", folder / "recipe.toml", "--out", folder / "run", "--set", "run.steps=9")
    assert (done.code, "run.steps: 6 → 9" in done.err) == (1, True)


def test_data_that_changed_are_refused(folder, moecc, tmp_path):
    run = killed(folder, 4, "moved")
    tokens = tmp_path / "train"
    shutil.copytree(folder / "tokens" / "heldout", tokens)
    code, _, err = moecc("train", "--resume", run, "--set", f"data.train.0.tokens={tokens}")
    assert code == 1
    assert "train/train: the data changed since the run began" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 2, "RECIPE --out RUN, or --resume RUN"),
        ("--resume run --out x", 2, "leave --out out"),
        ("--resume run --fork run@4", 2, "leave --fork out, or --resume"),
        ("recipe.toml --out tokens", 1, "--resume RUN goes on with a run"),
        ("recipe.toml --fork run@7 --out x", 1, "best, last, or one of the steps"),
        ("recipe.toml --fork run@5 --out x", 1, "the last run.keep stay"),
    ],
)
def test_what_cannot_be_is_one_message(folder, moecc, monkeypatch, words, code, said):
    monkeypatch.chdir(folder)
    done = moecc("train", *words.split())
    assert (done.code, said in done.err) == (code, True), done.err
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("mesh.mesh=data=3", "mesh"),
        (
            "run.export_steps=2; run.export_to=gguf:llama",
            "mixtral has an expert layer at every depth",
        ),
        ("model.start=source", "no weights"),
        ("mesh.mesh=data=8", "groups of tokens do not"),
        (
            "model.pipeline=''; mesh.mesh=data=4; run.micro_batches=2",
            "the batch on a device, 1 sequence: micro-batches hold whole",
        ),
        (
            "mesh.mesh=data=16; data.batch=16",
            "the mesh has more devices than there are\n  expected: at most 8 devices\n  found: 16",
        ),
        ("model.source=small", "ids beyond the voc"),
        ("data.train.0.tokens=other", "other tokenizer"),
        (
            "model.pipeline=''; optimizer.groups=[{match='*', freeze=true}]",
            "no parameter is trained",
        ),
        ("model.pipeline=''; optimizer.groups=[{match='mo'}]", "did you mean 'moe'"),
    ],
)
def test_settings_that_do_not_suit_are_one_message(folder, moecc, monkeypatch, settings, said):
    monkeypatch.chdir(folder)
    done = moecc("train", "recipe.toml", "--out", "x", *set_options(*settings.split("; ")))
    assert (done.code, said in done.err) == (1, True), done.err
    assert not (folder / "x").exists()


@pytest.mark.slow
def test_doubles_are_trained_and_evaluated_as_doubles(folder, moecc, tmp_path):
    run, data = tmp_path / "run", folder / "tokens" / "heldout"
    sets = set_options(
        "run.dtype=f64", "run.weight_dtype=f64", "run.steps=1", "run.evaluate_steps=1"
    )
    code, _, err = moecc("train", folder / "recipe.toml", "--out", run, *sets)
    assert (code, "Warning" in err) == (0, False), err
    assert {t.dtype for t in saved_steps(run)[-1].facts.tensors.values()} == {"f64"}
    held = journal(run)[-1]["held_out"]["heldout"]
    losses = {}
    for dtype in ("f32", "f64"):
        done = moecc(
            "evaluate", run, "--data", data, "--sequence", 8, "--batch", 4, "--batches", 1,
            "--dtype", dtype, "--format", "json",
        )  # fmt: skip
        assert (done.code, "Warning" in done.err) == (0, False), done.err
        losses[dtype] = done.json()["models"][0]["sets"]["heldout"]["loss"]
    assert losses["f64"] == pytest.approx(held, rel=1e-13)
    assert losses["f32"] != pytest.approx(held, rel=1e-13)
