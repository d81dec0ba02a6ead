"""A run that begins with the moments of another: which follow, and what it changes."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.formats.open import open_checkpoint
from moecc.formats.run import saved_steps, state_reader
from moecc.jobs.convert import convert
from moecc.jobs.training import carried_from, open_source, over_its_source
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.recipe import OptimizerSection
from moecc.train.recipe_text import parse_recipe
from moecc.train.settings import carried_moments, saved_moments
from moecc.train.state import canonical
from moecc.types import F32
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import sources

from .tiny import make_recipe


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("init", ["copy", "drop", "noise"])
def test_every_moment_of_an_upcycled_model_follows_but_routers(init, optimizer):
    section = OptimizerSection(name=optimizer)
    with open_model("tests/golden/llama_gqa") as model:
        before = canonical(model.graph).graph
        graph = canonical(model.graph).graph
    run_pipeline(graph, Pipeline.parse(f"upcycle{{experts=4 top-k=2 init={init}}}"))
    made = over_its_source(canonical(graph))
    found = carried_moments(made, section, saved_moments(before, section), 10)
    zeros = {name for name, moment in found.items() if not sources(moment)}
    assert zeros == {name for name in found if "router" in name}
    assert {name.split(".", 2)[2] for name in found} == set(made.params)


def write_optimizer(folder, names, shapes):
    """Write the state of torch's Adam by name, and return it."""
    rng, state = np.random.default_rng(0), {}
    for name, shape in zip(names, shapes, strict=True):
        for kind in ("exp_avg", "exp_avg_sq"):
            state[f"{kind}.{name}"] = rng.random(shape, np.float32)
        state[f"step.{name}"] = np.array(7, np.float32)
    save_file(state, folder / "optimizer.safetensors")
    return state


def test_the_state_of_an_optimiser_in_pytorch_follows_by_name(tmp_path):
    folder = tmp_path / "model"
    convert("tests/golden/llama_gqa", str(folder), to="st_moe", emit="torch",
            pipeline="upcycle{experts=4 top-k=2}")  # fmt: skip
    with open_checkpoint(folder) as checkpoint:
        names = list(checkpoint.tensors)
        state = write_optimizer(folder, names, [checkpoint.tensors[n].shape for n in names])
    recipe = parse_recipe(
        f'[model]\nsource = "{folder}"\npipeline = "grow"\nmoments = "carry"\n'
        '[data]\nbatch = 1\nseq = 8\ntrain = [{ tokens = "t" }]\n[run]\nsteps = 1\n',
        "recipe.toml",
    )
    with open_source(recipe) as source:
        carried = carried_from(source, recipe.optimizer)
        moments = {n: np.asarray(evaluate(e, carried.read, F32))
                   for n, e in carried.moments.items()}  # fmt: skip
    assert int(carried.read("moments.count")) == 7
    expected = state["exp_avg_sq.model.layers.1.mlp.up_proj.weight"]
    (grown,) = (x for n, x in moments.items() if n.startswith("moments.v") and "1.mlp.up" in n)
    assert len(grown) == 2 * len(expected)
    assert np.count_nonzero(grown) == grown.size
    name = "model.norm.weight"
    assert np.array_equal(moments[f"moments.m.{name}"], state[f"exp_avg.{name}"])

    state["step.model.norm.weight"] = np.array(8, np.float32)
    save_file(state, folder / "optimizer.safetensors")
    with open_source(recipe) as source, pytest.raises(InputError, match=r"steps \[7, 8\]"):
        carried_from(source, recipe.optimizer)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a recipe, and a run of it without experts."""
    folder = tmp_path_factory.mktemp("carried")
    recipe = make_recipe(folder, "steps = 30")
    words = ["--set", "model.pipeline=''", "--set", "run.guard.sigma=0"]
    assert main(["train", str(recipe), "--out", str(folder / "dense"), *words]) == 0
    return folder


def trained_on(folder, moments, *sets):
    given = [f"model.source={folder / 'dense'}", "model.start=source", "run.steps=8",
             "run.save_steps=1", "run.keep=9", f"model.moments={moments}", *sets]  # fmt: skip
    words = [word for one in given for word in ("--set", one)]
    return ["train", str(folder / "recipe.toml"), "--out", str(folder / moments), *words]


def moved(run, step):
    """How far the head moved in a step of a run, and before that from its source."""
    name, source = "params.lm_head.weight", run.parent / "dense"
    before = state_reader(saved_steps(source)[-1].state).read(name)
    after = state_reader(saved_steps(run)[step - 1].state).read(name)
    return float(np.linalg.norm(after - before))


@pytest.mark.slow
def test_a_run_goes_on_with_the_moments_of_another(dense):
    pytest.importorskip("orbax.checkpoint")
    losses = {}
    for moments in ("carry", "reset"):
        assert main(trained_on(dense, moments)) == 0
        lines = (dense / moments / "metrics.jsonl").read_text().splitlines()
        losses[moments] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses["carry"][0] == losses["reset"][0]
    # A first step without moments is one of full size in every direction.
    sizes = {m: moved(dense / m, 1) for m in losses}
    assert 0 < sizes["carry"] < 0.9 * sizes["reset"]
    counts = [
        int(state_reader(saved_steps(dense / run)[-1].state).read("moments.count"))
        for run in ("carry", "reset")
    ]
    assert counts == [38, 8]
    norms = [
        np.linalg.norm(state_reader(saved_steps(run)[-1].state).read("moments.m.lm_head.weight"))
        for run in (dense / "carry", dense / "reset")
    ]
    assert all(norm > 0 for norm in norms)
