"""A run that goes from mesh to mesh is the run that stays on one device."""

import json

import pytest

from moecc.cli.main import main
from moecc.formats.run import saved_steps

pytest.importorskip("jax")
pytest.importorskip("orbax.checkpoint")

from .tiny import make_recipe

pytestmark = pytest.mark.slow

SETS = (
    "model.pipeline=upcycle{experts=8 top-k=2 layers=every:2}", "data.batch=16",
    "routing.capacity_factor=1.25", "routing.groups=8",
)  # fmt: skip
MESHES = ("data=2,expert=4", "data=8", "data=4,model=2", "")
"""Two by four, eight, four by two, and one device again."""


def words(*sets):
    return [word for one in sets for word in ("--set", one)]


def journal(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def forget(run, step):
    """Make the checkpoints after `step` incomplete, as a kill would."""
    for saved in saved_steps(run):
        if saved.number > step:
            (saved.folder / "step.json").unlink()


def test_a_run_goes_from_one_device_to_eight_and_back(tmp_path):
    settings = "steps = 10\nsave_steps = 2\nevaluate_steps = 5\nkeep = 9"
    recipe = make_recipe(tmp_path, settings, seq=32)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        assert main(["train", str(recipe), "--out", str(folder), *words(*SETS)]) == 0
    for step, mesh in zip((2, 4, 6, 8), MESHES, strict=True):
        forget(run, step)
        assert main(["train", "--resume", str(run), *words(f"mesh.mesh='{mesh}'")]) == 0
        assert saved_steps(run)[-1].number == 10
    ours, theirs = journal(run), journal(whole)
    assert len(ours) == len(theirs) == 12
    assert any(value > 0 for name, value in theirs[4].items() if name.endswith("dropped"))
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            exact = name in ("step", "tokens") or name.endswith((".dropped", ".loads"))
            tolerance = 0.0 if exact else 1e-5
            if name not in ("held_out", "spread"):
                assert line[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for ours_held, held in ((a["held_out"], b["held_out"]) for a, b in
                            zip(ours, theirs, strict=True) if "held_out" in b):  # fmt: skip
        assert ours_held == pytest.approx(held, rel=1e-5)
