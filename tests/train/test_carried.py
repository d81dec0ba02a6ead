"""A run that begins with the moments of another: which follow, and what it changes."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from moecc.errors import InputError
from moecc.formats.open import open_checkpoint
from moecc.formats.run import saved_steps, state_reader
from moecc.jobs.convert import convert
from moecc.jobs.training import carried_from, open_source, over_its_source
from moecc.train.recipe import OptimizerSection
from moecc.train.recipe_text import parse_recipe
from moecc.train.settings import carried_moments, saved_moments
from moecc.train.state import canonical
from moecc.types import F32
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import sources

from .tiny import golden_graph, journal, make_recipe, piped, train


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("init", ["copy", "drop", "noise"])
def test_every_moment_of_an_upcycled_model_follows_but_routers(init, optimizer):
    section = OptimizerSection(name=optimizer)
    model = golden_graph("llama_gqa")
    saved = saved_moments(canonical(model).graph, section)
    graph = piped(canonical(model).graph, f"upcycle{{experts=4 top-k=2 init={init}}}")
    upcycled = over_its_source(canonical(graph))
    moments = carried_moments(upcycled, section, saved, 10)
    zeros = {name for name, moment in moments.items() if not sources(moment)}
    assert zeros == {name for name in moments if "router" in name}
    assert {name.split(".", 2)[2] for name in moments} == set(upcycled.params)


def test_the_state_of_an_optimiser_in_pytorch_follows_by_name(tmp_path):
    folder = tmp_path / "model"
    convert("tests/golden/llama_gqa", str(folder), to="st_moe", emit="torch",
            pipeline="upcycle{experts=4 top-k=2}")  # fmt: skip
    rng, state = np.random.default_rng(0), {}
    with open_checkpoint(folder) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                state[f"{kind}.{name}"] = rng.random(tensor.shape, np.float32)
            state[f"step.{name}"] = np.array(7, np.float32)
    save_file(state, folder / "optimizer.safetensors")
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
    train(recipe, folder / "dense", "model.pipeline=''", "run.guard.sigma=0")
    return folder


def trained_on(folder, moments):
    """Return a run of 8 steps, all of them saved, that begins with the parameters of `dense`."""
    return train(
        folder / "recipe.toml", folder / moments, f"model.source={folder / 'dense'}",
        "model.start=source", "run.steps=8", "run.save_steps=1", "run.keep=9",
        f"model.moments={moments}",
    )  # fmt: skip


def array_of(run, name, saved=-1):
    """Return an array of a checkpoint of a run, of the last one if nothing else is said."""
    return state_reader(saved_steps(run)[saved].state).read(name)


@pytest.mark.slow
def test_a_run_goes_on_with_the_moments_of_another(dense):
    pytest.importorskip("orbax.checkpoint")
    runs = [trained_on(dense, moments) for moments in ("carry", "reset")]
    carried, reset = (journal(run)[0]["loss"] for run in runs)
    assert carried == reset
    # A first step without moments is one of full size in every direction.
    head = "params.lm_head.weight"
    before = array_of(dense / "dense", head)
    carried, reset = (np.linalg.norm(array_of(run, head, 0) - before) for run in runs)
    assert 0 < carried < 0.9 * reset
    assert [int(array_of(run, "moments.count")) for run in runs] == [38, 8]
    moments = [array_of(run, "moments.m.lm_head.weight") for run in runs]
    assert all(np.linalg.norm(moment) > 0 for moment in moments)
