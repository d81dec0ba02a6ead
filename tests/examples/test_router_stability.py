"""The example on the router z-loss: that it trains, measures what it says, and draws it."""

import json
import math

import numpy as np
import pytest

from moecc.errors import UsageError

from .loading import load

pytest.importorskip("matplotlib", reason="needs moecc[examples]")
pytest.importorskip("optax", reason="needs moecc[examples]")
example = load("router_stability")


def test_measures_by_hand():
    """Two layers of one token and two experts; a constant in its logits is no spread."""
    outputs = {
        "trace.layers.1.ffn.logits": np.array([[3.0, 5.0]]),
        "trace.layers.3.ffn.logits": np.array([[-6.0, -6.0]]),
        **{f"metric.layers.{n}.ffn.{name}": np.array(float(n))
           for n in (1, 3) for name in ("entropy", "dropped", "dead_experts")},
    }  # fmt: skip
    found = example.measures(outputs)
    assert float(found["logit_max"]) == 6
    assert float(found["logit_rms"]) == pytest.approx(math.sqrt((9 + 25 + 36 + 36) / 4))
    assert float(found["logit_spread"]) == pytest.approx(math.sqrt(2 / 4))
    assert float(found["entropy"]) == 2


@pytest.mark.parametrize("given", ["--rates=fast", "--rates=0.1,-1", "--steps=0", "--seeds=0"])
def test_what_it_refuses(given, tmp_path):
    assert example.main([given, "--out", str(tmp_path)]) == UsageError.exit_code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_trains(tmp_path, capsys):
    quick = ["--quick", "--dtype", "f32", "--rates", "0.2", "--out", str(tmp_path)]
    assert example.main([*quick, "--steps", "40"]) == 0
    assert (tmp_path / "router_stability.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "router_stability.json").read_text())
    without, with_z = found["runs"]
    assert (without["variant"], with_z["variant"]) == ("without z-loss", "with z-loss")
    for run in (without, with_z):
        loss = run["history"]["loss"]
        assert len(loss) == 40
        assert loss[0] > 5 > 4 > loss[-1] > 1
        assert 1 < run["held_out"] < 4
    # The first step is measured before the z-loss has changed anything.
    assert without["history"]["loss"][0] == with_z["history"]["loss"][0]
    assert max(without["history"]["logit_max"]) > max(with_z["history"]["logit_max"])
