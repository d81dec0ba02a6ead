"""Routers are trained first: until a group begins it has no gradient, no moments and no update."""

import ast
import json
import shutil

import numpy as np
import pytest

from moecc.formats.run import METRICS, saved_steps, state_reader
from moecc.train.recipe import OptimizerSection, ParameterGroup
from moecc.train.settings import phase_at, phases_of

from .tiny import make_recipe, resume, train

GROUPS = "[{match='router'}, {match='norm', freeze=true}, {match='*', from_step=3}]"
EMBEDDING = "model.embed_tokens.weight"


def test_a_phase_freezes_what_begins_later():
    section = OptimizerSection(
        groups=(
            ParameterGroup("router"),
            ParameterGroup("norm", freeze=True),
            ParameterGroup("moe", from_step=9),
            ParameterGroup("*", from_step=3),
        )
    )
    phases = phases_of(section)
    assert [phase.first_step for phase in phases] == [0, 3, 9]
    assert [[g.freeze for g in phase.section.groups] for phase in phases] == [
        [False, True, True, True],
        [False, True, True, False],
        [False, True, False, False],
    ]
    assert [phase_at(phases, done) for done in (0, 2, 3, 8, 9, 99)] == [0, 0, 1, 1, 2, 2]
    assert len(phases_of(OptimizerSection())) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("phases")
    recipe = make_recipe(folder, "steps = 5\nsave_steps = 1\nkeep = 9")
    return train(recipe, folder / "run", f"optimizer.groups={GROUPS}")


def state_of(run, step):
    return next(saved.state for saved in saved_steps(run) if saved.number == step)


def names(run, step, kind):
    keys = json.loads((state_of(run, step) / "_METADATA").read_text())["tree_metadata"]
    paths = (".".join(ast.literal_eval(key)) for key in keys)
    return {name.removeprefix(f"{kind}.") for name in paths if name.startswith(f"{kind}.")}


def tensor(run, step, name):
    return state_reader(state_of(run, step)).read(name)


def test_what_begins_later_has_no_moments_before(run):
    assert {n.split(".")[-2] for n in names(run, 2, "moments.m")} == {"router"}
    # A state is that of the step which follows.
    assert EMBEDDING in names(run, 3, "moments.m")
    assert not tensor(run, 3, f"moments.m.{EMBEDDING}").any()
    assert tensor(run, 4, f"moments.m.{EMBEDDING}").any()
    assert not any("norm" in n for n in names(run, 5, "moments.m"))
    assert int(tensor(run, 5, "moments.count")) == 5
    assert int(tensor(run, 5, "moments.count.3")) == 2


def test_what_begins_later_stays_as_it_was_before(run):
    first, third, fourth = (tensor(run, step, f"params.{EMBEDDING}") for step in (1, 3, 4))
    np.testing.assert_array_equal(first, third)
    assert (third != fourth).any()
    router = next(n for n in names(run, 1, "params") if "router" in n)
    assert (tensor(run, 1, f"params.{router}") != tensor(run, 2, f"params.{router}")).any()


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_goes_on_in_either_phase(run, step, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    for saved in saved_steps(again):
        if saved.number > step:
            shutil.rmtree(saved.folder)
    resume(again)
    assert (again / METRICS).read_bytes() == (run / METRICS).read_bytes()
