"""The table of ``benchmarks/plan_vs_xla.py``: what it compares, and how it marks what is off."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.plan.search import check_devices, check_layout
from moecc.plan.step import plan_mesh
from moecc.plan.workload import make_batch, workload
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.layout import Layout

FILE = Path(__file__).parents[2] / "benchmarks" / "plan_vs_xla.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("plan_vs_xla", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_vs_xla"] = module
    spec.loader.exec_module(module)
    return module


def report(flops: float, peak: float) -> dict[str, Any]:
    sizes = {"arguments_bytes": 1e9, "outputs_bytes": 0.9e9, "temporaries_bytes": 2e9}
    return {
        "optimizer": "adamw",
        "remat": "full",
        "flops": 100e12,
        "collectives": {"all-gather": {"bytes": 3e9}, "all-to-all": {"bytes": 1e9}},
        "memory": {**sizes, "peak_bytes": 4e9},
        "predicted": {
            **sizes, "flops": flops, "needed_bytes": peak,
            "collectives": {"all_gather": {"bytes": 4e9}},
            "overlap": {"all_gather": {"overlapped_bytes": 2.7e9, "exposed_bytes": 1.3e9}},
        },
        "overlap": {"all-gather": {"overlapped_bytes": 3e9, "exposed_bytes": 1e9}},
        "seconds": {"compile": 12.3},
    }  # fmt: skip


def test_a_row_marks_what_lies_beyond_its_bound(benchmark: Any) -> None:
    pair = benchmark.PAIRS["llama"]
    near, within = benchmark.row_of(pair, report(101e12, 4.5e9))
    assert "100.00 (+1.0%) | 4.00 (+0.0%) | 1.00 (+0.0%) | 0.90 (+0.0%) | 2.00 (+0.0%)" in near
    assert "4.00 (+12.5%)" in near
    assert within
    far, within = benchmark.row_of(pair, report(97e12, 4.7e9))
    assert "100.00 (-3.0% !)" in far
    assert "4.00 (+17.5% !)" in far
    assert not within


def test_overlap_has_bounds_of_its_own(benchmark: Any) -> None:
    bounds = benchmark.OVERLAP_BOUNDS
    row, within = benchmark.row_of(benchmark.PAIRS["llama"], report(97e12, 4.7e9), bounds)
    assert "4.00 (+0.0%) | 3.00 (-10.0%) | 1.00 (+30.0% !)" in row
    assert not within
    head = benchmark.head_of(bounds)
    assert head[-3:] == ["beside products, GB", "exposed, GB", "compiled in"]
    assert row.count(" | ") == len(head) - 1


def test_a_table_without_enough_rows_fails(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be compiled, here for its mesh, is left out and counts for nothing."""
    none = benchmark.Pair("smollm2-135m", "tpu:v5e:2x4", "data=7", 65536)
    monkeypatch.setattr(benchmark, "PAIRS", {"none": none})
    monkeypatch.setattr(sys, "argv", ["plan_vs_xla.py"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 1
    assert "none is left out" in capsys.readouterr().err


def test_there_are_eight_pairs_and_each_can_be_laid_out(benchmark: Any) -> None:
    assert len(benchmark.PAIRS) >= benchmark.LEAST
    for pair in benchmark.PAIRS.values():
        graph, machine = open_model(f"preset:{pair.model}").graph, parse_machine(pair.machine)
        if "-p" in pair.options:
            passes = pair.options[pair.options.index("-p") + 1]
            run_pipeline(graph, Pipeline.parse(passes))
        batch = make_batch(graph, machine.devices, pair.batch_tokens, pair.lengths)
        work, mesh = workload(graph, batch), plan_mesh(pair.mesh)
        check_devices(mesh, machine.devices, machine.name)
        check_layout(Layout(mesh, work.experts), work)
