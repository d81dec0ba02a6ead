"""From a configuration to a plan, a compiled step and a report."""

import pytest
from tiers import few

from .loading import load

example = load("plan_a_pod")


@pytest.mark.parametrize("pod", few(example.PODS), ids=lambda p: p.model)
def test_every_pod_has_a_plan_that_fits(pod):
    best = example.planned(pod)["best"]
    assert best["fits"]
    assert best["remat"] == "full"


@pytest.mark.slow
def test_the_report_has_the_plan_and_the_program(tmp_path, monkeypatch):
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    pytest.importorskip("plotly")
    monkeypatch.setattr(example, "PODS", (example.Pod("preset:smollm2-135m", "cpu", (128,)),))
    assert example.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "pods.md").read_text("utf-8")
    assert "parameters   134,515,008" in page
    assert "Memory of a device" in (tmp_path / "smollm2-135m.html").read_text("utf-8")
