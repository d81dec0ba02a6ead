"""A plan in a file: what is written, and what `compile` and `train` take from it."""

import json
from pathlib import Path

import pytest

from moecc.ahead.worker import prepare
from moecc.cli.main import main
from moecc.errors import InputError
from moecc.jobs.compile import CompileOutcome, compile
from moecc.plan.step import ProgramConfig, read_plan
from tests.train.tiny import draw_weights, make_corpus, make_model

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = str(GOLDEN / "llama_gqa")
PIPELINE = "upcycle{experts=4 top-k=2}"


def saved(folder, *more, model=MODEL):
    path = folder / "plan.json"
    command = ["plan", model, "--machine", "cpu:8", "--sequence", "64"]
    passes = () if "-p" in more else ("-p", PIPELINE)
    assert main([*command, *passes, "--save", str(path), *more]) == 0
    return path


def test_what_is_saved_is_the_report_and_the_request(tmp_path, capsys):
    path = saved(tmp_path, "--format", "json", "--optimizer", "adafactor")
    shown, written = json.loads(capsys.readouterr().out), json.loads(path.read_text())
    asked = written.pop("request")
    assert written == shown
    assert asked["pipeline"] == PIPELINE
    assert asked["optimizer"] == "adafactor"
    found = read_plan(str(path))
    assert dict(found.config.device_mesh.axes) == shown["best"]["mesh"]
    assert found.machine == "cpu:8"
    assert saved_again(path) == 1
    assert "--force" in capsys.readouterr().err


def saved_again(path):
    return main(["plan", MODEL, "--machine", "cpu:8", "--save", str(path)])


@pytest.fixture
def requested(monkeypatch):
    """Return a function that returns the request to the compiling process."""
    requests = []

    def compile_in_subprocess(request, seconds):
        requests.append(request)
        return CompileOutcome({"remarks": [], "fits": True})

    def run(**options):
        compile(MODEL, **options)
        return requests[-1]

    monkeypatch.setattr("moecc.jobs.compile.compile_in_subprocess", compile_in_subprocess)
    return run


def test_compile_takes_all_of_it(tmp_path, requested):
    more = ("--mesh", "fsdp=2,expert=4", "--via", "ring", "--remat", "full",
            "--dense-weights", "split", "--optimizer", "adafactor", "--micro-batches", "2",
            "--weight-dtype", "bf16", "--reduce-dtype", "float32")  # fmt: skip
    path = str(saved(tmp_path, *more))
    assert requested(plan=path) == requested(
        machine="cpu:8", pipeline=PIPELINE, config=ProgramConfig(
            sequence="64", mesh="fsdp=2,expert=4", via="ring", remat="full", dense_weights="split",
            optimizer="adafactor", rules=read_plan(path).config.rules, weight_dtype="bf16",
            micro_batches=2, reduce_dtype="float32",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("option", [("--remat", "full"), ("--step", "forward"), ("--slice",)])
def test_compile_refuses_a_setting_that_the_plan_states(tmp_path, option, capsys):
    path = saved(tmp_path)
    assert main(["compile", MODEL, "--plan", str(path), *option]) == 2
    assert f"{option[0]}: the plan says it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mesh",
    [("data=8",), ("data=2,expert=4", "--via", "ring"), ("data=2,expert=4", "--via", "capacity")],
)
def test_the_program_of_a_plan_is_the_one_that_was_planned(tmp_path, requested, mesh):
    path = saved(tmp_path, "--mesh", *mesh)
    best = json.loads(path.read_text())["best"]
    prepared = prepare(requested(plan=str(path)))
    assert prepared.estimate.seconds == best["seconds"]
    assert prepared.estimate.memory.total == best["total_bytes"]
    assert (prepared.bound is None) == (best["dispatch"] == "grouped") == best["exact"]


def test_a_recipe_gets_mesh_and_remat(tmp_path):
    more = ("--mesh", "fsdp=2,expert=4", "--via", "ring", "--remat", "full",
            "--micro-batches", "2", "--reduce-dtype", "f32")  # fmt: skip
    found = read_plan(str(saved(tmp_path, *more)))
    values = found.recipe_values()
    assert {"run.micro_batches=2", "run.dtype=bf16", "run.reduce_dtype=f32"} < set(values)
    assert not any(value.startswith("run.weight_dtype") for value in values)
    assert "mesh.mesh=fsdp=2,expert=4" in values
    assert "mesh.via=ring" in values
    assert "run.remat=full" in values
    assert "run.remat=full" not in found.recipe_values(is_new=False)


OTHERS = {
    "more experts": (
        ("-p", "upcycle{experts=8 top-k=2}"),
        ("other passes", f"expected: {PIPELINE}, as model.pipeline is",
         "a model with other parameters", "with upcycle{experts=8 top-k=2}"),
    ),
    "a forward step": (
        ("-p", "upcycle{experts=4 top-k=1 gates=switch}", "--step", "forward"),
        ("another step", "--step train", "other passes", "gates=switch"),
    ),
    "a mesh for more experts": (
        ("-p", "upcycle{experts=8 top-k=2}", "--mesh", "expert=8"),
        ("other passes", "a model with other parameters"),
    ),
    "no passes": (("-p", ""), ("other passes", "no experts", "a model with other parameters")),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return written_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_rejects_the_plan_of_another_model(tmp_path, recipe, case, capsys):
    more, words = OTHERS[case]
    path = saved(tmp_path, *more, model=str(recipe.parent / "model"))
    capsys.readouterr()
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run), "--plan", str(path), "--dry-run"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert all(word in said for word in words), said
    assert str(path) in said
    assert not run.exists()


def test_a_run_is_told_the_batch_of_its_plan(tmp_path, recipe, capsys):
    """A dry run plans for the machine of the plan."""
    model, run = str(recipe.parent / "model"), str(tmp_path / "run")
    path = saved(tmp_path, "--batch-tokens", "1024", model=model)
    command = ["train", str(recipe), "--out", run, "--plan", str(path), "--dry-run"]
    told = "planned for 16 sequences of 64, this run has 8 of 32: "
    options = ("--set", "data.batch=16", "--set", "data.seq=64")
    for more, is_told in (((), True), (options, False)):
        capsys.readouterr()
        assert main([*command, *more]) == 0
        done = capsys.readouterr()
        assert (told + " ".join(options) in " ".join(done.err.split())) == is_told, done.err
        assert "plan         cpu:8: " in done.out


def written_recipe(folder, batch=8, pipeline=PIPELINE):
    draw_weights(make_model(folder / "model"))
    make_corpus(folder / "tokens")
    path = folder / "recipe.toml"
    path.write_text(f"""
[model]
source = "model"
pipeline = "{pipeline}"
[data]
batch = {batch}
seq = 32
train = [{{ tokens = "tokens/train" }}]
[run]
steps = 3
""")
    return path


# --- bad input


WRONG = {
    "no schema": (lambda d: d.pop("schema"), "moecc.plan/1"),
    "another schema": (lambda d: d.update(schema="moecc.plan/2"), "moecc.plan/1"),
    "no request": (lambda d: d.pop("request"), "request"),
    "a list as request": (lambda d: d.update(request=[]), "not an object"),
    "a truth value as tokens": (lambda d: d["request"].update(batch_tokens=True), "batch_tokens"),
    "a mesh of texts": (lambda d: d["best"].update(mesh={"data": "8"}), "best.mesh.data"),
    "rules of numbers": (lambda d: d["best"].update(rules=[1]), "best.rules.0"),
    "sliced is a number": (lambda d: d["best"].update(sliced=1), "best.sliced"),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("plan")).read_text()


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_plan_is_reported(tmp_path, plan, case):
    change, words = WRONG[case]
    path = tmp_path / "plan.json"
    data = json.loads(plan)
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        read_plan(str(path))
    assert words in str(caught.value)
