"""``make proof-step``: the training step beside a loop in torch that is written by hand.

    python -m tests.proof.step [--python PYTHON] [--out FILE]

PYTHON has torch, and is by default the first that MOECC_PARITY_PYTHON lists.  Prints a JSON object,
and exits with 3 if a case is farther apart than it may be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import cos, pi
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import numpy as np
from moecc_backends.xla.program import in_precision
from moecc_backends.xla.train.step import make_train_step

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.model.initialise import initialise
from moecc.model.open import OpenedModel
from moecc.plan.step import StepConfig
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.batches import TARGETS
from moecc.train.graphs import MeshPasses, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection, ParameterGroup
from moecc.train.settings import StepSpec
from moecc.types import F64, float_type
from moecc.version import __version__

PROBE = Path(__file__).with_name("step_in_torch.py")
BATCH, SEQ, STEPS = 8, 12, 20
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 37}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 131}  # fmt: skip
SPARSE = "upcycle{experts=4 top-k=2 init=noise noise-std=0.3 router-std=1.0}"
BALANCE, Z = 0.5, 0.1


@dataclass(frozen=True)
class Case:
    """A step, and how far from torch's it may be.

    Attributes:
      sizes: of the model.
      pipeline: what makes it sparse, if anything.
      optimizer: its section.
      dtype: of the computation; master weights are float64 beside float64, else float32.
      micro_batches: the parts of a batch.
      mesh: where it is laid on several devices.
      tolerance: the largest difference of losses, and of parameters over the distance moved.
    """

    sizes: dict[str, int] = field(default_factory=lambda: SMALL)
    pipeline: str = ""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    dtype: str = "f64"
    micro_batches: int = 1
    mesh: MeshPasses | None = None
    tolerance: float = 1e-6


FROZEN = (ParameterGroup("attention", freeze=True), ParameterGroup("norm", rate=0.5))
REPLICATED = MeshPasses("data:4,expert:2", ("expert-replicated",), "replicated")
CASES = {
    "dense, AdamW": Case(),
    "dense, four micro-batches": Case(micro_batches=4),
    "sparse, losses of routers": Case(pipeline=SPARSE),
    "sparse, two micro-batches": Case(pipeline=SPARSE, micro_batches=2),
    "dense, Adafactor": Case(WIDE, optimizer=OptimizerSection("adafactor")),
    "attention frozen, norms at half the rate": Case(optimizer=OptimizerSection(groups=FROZEN)),
    "dense, bf16 beside float64": Case(dtype="bf16", tolerance=0.1),
    "sparse, bf16 beside float64": Case(pipeline=SPARSE, dtype="bf16", tolerance=0.3),
    "dense, 8 devices": Case(mesh=MeshPasses("data:8", ("data-parallel",))),
    "sparse, 8 devices": Case(pipeline=SPARSE, mesh=REPLICATED),
}


def rate_of(step: int) -> float:
    """Return the rate of a step: a warm-up, and a cosine to a tenth."""
    share = max(step - 3, 0) / (STEPS - 4)
    return 1e-2 * min((step + 1) / 4, 0.1 + 0.9 * (1 + cos(pi * share)) / 2)


def run(case: Case, folder: Path):
    """Train a case, and write what torch needs to do the same, and to compare."""
    config = parse_config({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "initializer_range": 0.2, **case.sizes,
    })  # fmt: skip
    graph = build(config)
    run_pipeline(graph, Pipeline.parse(case.pipeline), context=Context(seed=1))
    initialise(graph, seed=1)
    before = OpenedModel(graph, "drawn").params(dtype=F64)
    losses = {"parts": case.micro_batches, "balance-coef": BALANCE, "z-coef": Z}
    # A sequence is a token group.
    groups = BATCH // case.micro_batches if case.pipeline else None
    passes = StepPasses(
        groups=groups, losses=losses if case.pipeline else None, routed=bool(case.pipeline),
        mesh=case.mesh, rolled=False,
    )  # fmt: skip
    weight_dtype = "f64" if case.dtype == "f64" else "f32"
    step_config = StepConfig(
        dtype=case.dtype, weight_dtype=weight_dtype, micro_batches=case.micro_batches
    )
    spec = StepSpec({"B": BATCH, "S": SEQ}, step_config, case.optimizer)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, case.sizes["vocab_size"], (STEPS, BATCH, SEQ)).astype(np.int32)
    targets = np.roll(tokens, -1, -1)
    targets[:, :, -1] = -1
    targets[:, 0, :5] = -1
    values, rates = [], [float(np.float32(rate_of(step))) for step in range(STEPS)]
    with in_precision(float_type(case.dtype), float_type(weight_dtype)):
        devices = jax.devices() if case.mesh else jax.devices()[:1]
        step = make_train_step(step_graph(graph, passes), spec, devices)
        state = step.init(before)
        start = jax.tree.map(np.asarray, step.model_params(state))
        for number, rate in enumerate(rates):
            batch = {"tokens": tokens[number], TARGETS: targets[number]}
            state, metrics = step.step(state, batch, jax.random.key(0), rate)
            values.append(float(metrics["loss"]))
        after = jax.tree.map(np.asarray, step.model_params(state))
    np.savez(
        folder / "arrays.npz", tokens=tokens, targets=targets, losses=np.array(values),
        **{f"before:{n}": a for n, a in start.items()},
        **{f"after:{n}": a for n, a in after.items()},
    )  # fmt: skip
    section = case.optimizer
    (folder / "case.json").write_text(json.dumps({
        "layers": 2, "head_dim": case.sizes["head_dim"], "theta": 500.0, "eps": 1e-5,
        "top_k": 2 if case.pipeline else 0, "balance": BALANCE, "z": Z,
        "optimizer": section.name, "b1": section.b1, "b2": section.b2, "adam_eps": section.eps,
        "clip": section.clip, "decay": section.decay, "rates": rates,
        "frozen": ["self_attn"] if section.groups else [],
        "norm_rate": 0.5 if section.groups else 1.0,
    }))  # fmt: skip


def main() -> int:
    """Run every case, print the results, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    paths = os.environ.get("MOECC_PARITY_PYTHON", sys.executable)
    parser.add_argument("--python", default=paths.split(os.pathsep)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only", default="", help="only cases with this text, beside those in FILE"
    )
    options = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if options.only in name}
    results = {}
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, str(number)) for number in range(len(cases))]
        for folder, (name, case) in zip(folders, cases.items(), strict=True):
            folder.mkdir()
            run(case, folder)
            print(f"trained: {name}", file=sys.stderr, flush=True)
        words = [options.python, str(PROBE), *map(str, folders)]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    for (name, case), line in zip(cases.items(), text.splitlines(), strict=True):
        found = json.loads(line)
        largest = max(found["largest difference of losses"],
                      found["parameters apart, of the distance moved"])  # fmt: skip
        ok = largest <= case.tolerance and not found["frozen parameters that moved"]
        results[name] = {**found, "tolerance": case.tolerance, "ok": ok}
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    document = {
        "moecc": __version__, "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(), "jax": jax.__version__, "cases": results,
    }  # fmt: skip
    text = json.dumps(document, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if all(result["ok"] for result in results.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
