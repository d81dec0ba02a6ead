"""A run that goes from mesh to mesh is the run that stays on one device."""

import pytest

from moecc.formats.run import saved_steps

pytest.importorskip("orbax.checkpoint")

from .tiny import forget, journal, make_recipe, resume, train

pytestmark = pytest.mark.slow

SETS = (
    "model.pipeline=upcycle{experts=8 top-k=2 layers=every:2}", "data.batch=16",
    "routing.capacity_factor=1.25", "routing.groups=8",
)  # fmt: skip
MESHES = ("data=2,expert=4", "data=8", "data=4,model=2", "")
"""Two by four, eight, four by two, and one device again."""


def test_a_run_goes_from_one_device_to_eight_and_back(tmp_path):
    settings = "steps = 10\nsave_steps = 2\nevaluate_steps = 5\nkeep = 9"
    recipe = make_recipe(tmp_path, settings, seq=32)
    whole, run = (train(recipe, tmp_path / name, *SETS) for name in ("whole", "run"))
    for step, mesh in zip((2, 4, 6, 8), MESHES, strict=True):
        resume(forget(run, step), f"mesh.mesh='{mesh}'")
        assert saved_steps(run)[-1].number == 10
    ours, theirs = journal(run), journal(whole)
    assert len(ours) == len(theirs) == 12
    assert any(value > 0 for name, value in theirs[4].items() if name.endswith("dropped"))
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            exact = name in ("step", "tokens") or name.endswith((".dropped", ".loads"))
            tolerance = 0.0 if exact else 1e-5
            if name == "held_out":
                assert line[name] == pytest.approx(value, rel=1e-5)
            elif name != "spread":
                assert line[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
