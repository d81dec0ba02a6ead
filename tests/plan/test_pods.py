"""The table of ``benchmarks/pods.py``: what it adds up, and how it marks what is not below."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.plan.search import check_devices, check_layout
from moecc.plan.step import plan_mesh
from moecc.plan.workload import make_batch, workload
from moecc.sharding.layout import Layout

FILE = Path(__file__).parents[2] / "benchmarks" / "pods.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("pods", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pods"] = module
    spec.loader.exec_module(module)
    return module


def report(moved: float, peak: float) -> dict[str, Any]:
    return {
        "collectives": {
            "all-gather": {"count": 6, "runs": 192, "bytes": moved - 1e9},
            "all-to-all": {"count": 6, "runs": 192, "bytes": 1e9},
        },
        "memory": {"temporaries_bytes": 10e9, "peak_bytes": peak},
        "seconds": {"compile": 38.4},
        "host_peak_bytes": 2.5e9,
    }


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let every program compile to a report, or to nothing."""

    def answer(found: dict[str, Any] | None) -> None:
        text = "" if found is None else json.dumps(found)
        done = subprocess.CompletedProcess([], 0, stdout=text, stderr="no libtpu\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    return answer


def test_a_row_says_what_lies_below_the_figures_beside_it(benchmark: Any, compiles: Any) -> None:
    program = benchmark.PROGRAMS["dropless"]
    compiles(report(48.5e9, 9.65e9))
    (own, other), below = benchmark.rows_of("dropless", program)
    assert own == (
        "| dropless | all-gather 47.50 in 192 runs, all-to-all 1.00 in 192 runs | 48.50 (0.50)"
        " | 10.00 | 9.65 (0.50) | 38 s | 2.50 |"
    )
    assert "MaxText, dropless" in other
    assert "97.00" in other
    assert below


@pytest.mark.parametrize(("moved", "peak"), [(97e9, 9e9), (9e9, 19.3e9)])
def test_what_is_not_below_is_marked(
    benchmark: Any, compiles: Any, moved: float, peak: float
) -> None:
    compiles(report(moved, peak))
    rows, below = benchmark.rows_of("dropless", benchmark.PROGRAMS["dropless"])
    assert "(1.00 !)" in rows[0]
    assert not below


def test_what_has_a_bound_must_be_compiled(benchmark: Any, compiles: Any) -> None:
    compiles(None)
    assert benchmark.rows_of("dropless", benchmark.PROGRAMS["dropless"]) == ([], False)
    assert benchmark.rows_of("ring", benchmark.PROGRAMS["dropless, ring"]) == ([], True)


def test_both_ways_have_bounds_and_each_program_can_be_laid_out(benchmark: Any) -> None:
    bounds = {rival for program in benchmark.PROGRAMS.values() for rival in program.rivals}
    assert bounds == set(benchmark.MAXTEXT)
    graph = open_model("preset:mixtral-8x7b").graph
    for program in benchmark.PROGRAMS.values():
        machine, mesh = parse_machine(program.machine), plan_mesh(program.mesh)
        work = workload(graph, make_batch(graph, machine.devices, program.batch_tokens, (4096,)))
        check_devices(mesh, machine.devices, machine.name)
        check_layout(Layout(mesh, work.experts), work)
