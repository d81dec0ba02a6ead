"""transformers computes of a written checkpoint what it computes of the dense source.

Runs where transformers is installed beside the tests, and in every interpreter that the environment
variable MOECC_PARITY_PYTHON lists (separated as in PATH), say one with version 4 and one with 5.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.conversion import plan, write
from moecc.families.propose import target_fits
from moecc.ir.dtypes import F64
from moecc.models import open_model
from moecc.pipeline.text import Pipeline

pytestmark = [pytest.mark.parity, pytest.mark.slow]

GOLDEN = Path(__file__).parents[1] / "golden"
PROBE = Path(__file__).parent / "logits_of.py"

DOUBLE = 1e-7
"""The bound on max |Δ logit| / max |logit| in float64; the golden logits carry 6e-8 of rounding."""

SINGLE = 1e-6
"""The same in float32."""


def interpreters() -> list[str]:
    listed = [path for path in os.environ.get("MOECC_PARITY_PYTHON", "").split(os.pathsep) if path]
    beside = [sys.executable] if importlib.util.find_spec("transformers") else []
    return [*listed, *beside]


def dense_sources() -> list[str]:
    """Return the golden checkpoints of dense families."""
    configs = {p.parent.name: json.loads(p.read_text()) for p in GOLDEN.glob("*/config.json")}
    return sorted(n for n, c in configs.items() if not c["model_type"].endswith(("moe", "mixtral")))


def plans(target: str) -> Iterator[str]:
    """Yield the options of `upcycle` that must keep the function when `target` is written."""
    shared = " shared=0.5" if target == "qwen2_moe" else ""
    for std, slices in product((0, 0.02, 1), (1, 2)):
        yield f"experts=8 top-k=2 granularity={slices} router-std={std}{shared}"
    yield f"experts=8 top-k=4 granularity=4 scale-placement=up-down router-std=1{shared}"
    yield f"experts=3 top-k=3 router-init=uniform router-std=1{shared}"
    yield f"experts=5 top-k=1 router-std=1{shared}"
    if target == "mixtral":
        return
    yield f"experts=4 top-k=2 layers=last:1 router-std=1{shared}"
    yield f"experts=4 top-k=2 layers=every:2 router-std=1{shared}"
    yield f"experts=8 top-k=2 gates=softmax router-init=zero{shared}"
    yield f"experts=4 top-k=4 gates=softmax router-std=1{shared}"


TARGETS = ["mixtral", "qwen2_moe", "qwen3_moe"]


def convert(source: str, target: str, options: str, folder: Path, *, exact: bool = True) -> None:
    with open_model(str(GOLDEN / source)) as model:
        planned = plan(model, Pipeline.parse(f"upcycle{{{options}}}"), target, seed=1)
        assert planned.preserves.kind == ("reassociation" if exact else "approximate")
        write(planned, folder)


def fits(source: str, target: str) -> bool:
    with open_model(str(GOLDEN / source)) as model:
        return not target_fits(model.graph)[target]


def logits_of(python: str, jobs: list[dict[str, str]]) -> list[dict[str, list[str]]]:
    """Run the probe; return what it reports of each job."""
    done = subprocess.run(
        [python, str(PROBE)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports: list[dict[str, list[str]]] = json.loads(done.stdout)["reports"]
    return reports


def relative(found: Path, expected: Path) -> float:
    a, b = np.load(found).astype(np.float64), np.load(expected).astype(np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.skipif(not interpreters(), reason="transformers is not installed")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("python", interpreters())
def test_every_source_as_every_target_that_fits(python: str, target: str, tmp_path: Path) -> None:
    sources = [s for s in dense_sources() if fits(s, target)]
    # What must fit at least.
    assert {"mixtral": {"llama", "mistral"}, "qwen2_moe": {"llama", "mistral", "qwen2"},
            "qwen3_moe": {"qwen3"}}[target] <= {s.split("_")[0] for s in sources}  # fmt: skip
    cases = list(product(sources, plans(target)))
    jobs = []
    for number, (source, options) in enumerate(cases):
        folder = tmp_path / str(number)
        convert(source, target, options, folder)
        jobs.append({"folder": str(folder), "tokens": str(GOLDEN / source / "tokens.npy")})
    wrong = []
    for (source, options), job, report in zip(cases, jobs, logits_of(python, jobs), strict=True):
        golden, folder = GOLDEN / source / "logits.npy", Path(job["folder"])
        off = {n: relative(folder / f"{n}.npy", golden) for n in ("float64", "float32")}
        if report or off["float64"] > DOUBLE or off["float32"] > SINGLE:
            wrong.append(f"{source}, {options}: {report or off}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)


@pytest.mark.skipif(not interpreters(), reason="transformers is not installed")
@pytest.mark.parametrize("python", interpreters())
def test_experts_that_differ_are_met_by_the_same_tokens(python: str, tmp_path: Path) -> None:
    """Among copies it would not show if a runtime mixed experts or router rows up."""
    cases = [
        (source, target, options)
        for source, target in (
            ("llama_gqa", "mixtral"), ("llama_square_tied", "mixtral"),
            ("qwen2_square", "qwen2_moe"), ("mistral_window", "qwen2_moe"),
            ("qwen3_head_dim_tied", "qwen3_moe"), ("qwen3_square", "qwen3_moe"),
        )
        for options in (
            "experts=8 top-k=2 init=drop drop-ratio=0.9",
            "experts=6 top-k=2 granularity=2 init=noise noise-std=1",
        )
    ]  # fmt: skip
    jobs, expected = [], []
    for number, (source, target, options) in enumerate(cases):
        folder = tmp_path / str(number)
        shared = " shared=0.5" if target == "qwen2_moe" else ""
        convert(source, target, f"{options} router-std=1{shared}", folder, exact=False)
        tokens = GOLDEN / source / "tokens.npy"
        jobs.append({"folder": str(folder), "tokens": str(tokens)})
        with open_model(str(folder)) as model:
            program = get_backend("reference").compile(model.graph)
            logits = program.run(model.params(dtype=F64), {"tokens": np.load(tokens)})["logits"]
        np.save(folder / "expected.npy", logits)
        expected.append(folder / "expected.npy")
        assert relative(expected[-1], GOLDEN / source / "logits.npy") > 0.1
    for case, job, report, path in zip(cases, jobs, logits_of(python, jobs), expected, strict=True):
        assert not report, case
        assert relative(Path(job["folder"]) / "float64.npy", path) <= 1e-12, case
