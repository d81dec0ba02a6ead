"""``make proof-recipes``: steps of the shipped recipes, compiled for machines that are not here.

    python -m tests.proof.recipes [CASE…] [--out FILE]

Each is the step that ``moecc train`` runs, with two micro-batches in bf16, compiled in a process of
its own, for TPUs (extra ``tpu``) and GPUs (extra ``gpu-aot``).  Beside what the compiler says is
what a plan predicts of the recipe.  A line of JSON is written for each case as it ends; the exit
code is 1 where one does not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecc.ir.graph import Graph
from moecc.ir.unroll import unrolled
from moecc.jobs.compile import environment
from moecc.jobs.train import planned_step
from moecc.model.open import open_model
from moecc.plan.machines import parse_machine
from moecc.plan.workload import length_variables
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.graphs import step_spec, train_graph, train_passes
from moecc.train.recipe import Recipe
from moecc.train.recipe_text import load_recipe
from moecc.train.state import canonical

POD, GPUS = "tpu:v5p:4x4x4", "gpu:h100:8"
SETS = ("run.micro_batches=2", "run.dtype=bf16", "data.batch=128")
SMOLLM2, ST_MOE = "smollm2-135m", "st-moe-base"


@dataclass(frozen=True)
class Case:
    """The step of a recipe on a machine.

    Attributes:
      recipe: one that is shipped.
      model: a preset.
      machine: where it is compiled for.
      mesh: its mesh.
      sets: more values of the recipe.
    """

    recipe: str
    model: str
    machine: str
    mesh: str
    sets: tuple[str, ...] = ()

    @property
    def values(self) -> list[str]:
        """All that the recipe is given."""
        model = f"model.source=preset:{self.model}"
        return [model, f"mesh.mesh={self.mesh}", *SETS, *self.sets]


ANSWERS = ("data.decoder_seq=64",)
"""Answers of a task are short."""

CASES = {
    "upcycle-v5p": Case("upcycle", SMOLLM2, POD, "data=8,expert=8"),
    "continue-dense-v5p": Case("continue-dense", SMOLLM2, POD, "fsdp=64"),
    "from-scratch-v5p": Case(
        "from-scratch", ST_MOE, POD, "data=8,expert=8", ("data.decoder_seq=114",)
    ),
    "st-moe-finetune-v5p": Case("st-moe-finetune", ST_MOE, POD, "data=8,expert=8", ANSWERS),
    "upcycle-h100": Case("upcycle", SMOLLM2, GPUS, "expert=8"),
    "continue-dense-h100": Case("continue-dense", SMOLLM2, GPUS, "fsdp=8"),
    "from-scratch-h100": Case("from-scratch", ST_MOE, GPUS, "expert=8", ("data.decoder_seq=114",)),
    "st-moe-finetune-h100": Case("st-moe-finetune", ST_MOE, GPUS, "expert=8", ANSWERS),
}


def model_of(case: Case) -> tuple[Recipe, Graph]:
    """Return the recipe of a case, and the graph of its model."""
    recipe = load_recipe(f"recipe:{case.recipe}", case.values)
    with open_model(recipe.model.source, config_alone=True) as model:
        graph = model.graph
    run_pipeline(graph, Pipeline.parse(recipe.model.pipeline))
    return recipe, canonical(graph).graph


def planned(case: Case) -> dict[str, Any]:
    """Return what the plan of ``train --dry-run`` says of a case."""
    recipe, graph = model_of(case)
    given = (recipe.data.seq, recipe.data.decoder_seq)
    lengths = dict(zip(length_variables(graph), given, strict=False))
    plan = planned_step(recipe, unrolled(graph), lengths, parse_machine(case.machine))
    return {
        "flops": plan.flops, "arguments_bytes": plan.memory.arguments,
        "outputs_bytes": plan.memory.state, "temporaries_bytes": plan.memory.heap,
        "peak_bytes": plan.memory.total,
        "collectives": {
            kind.replace("_", "-"): {"count": c["count"], "bytes": c["tensor_bytes"]}
            for kind, c in plan.collectives.items()
        },
    }  # fmt: skip


def compiled(case: Case) -> dict[str, Any]:
    """Return what the compiler says of a case, and the plan; in a process that has no jax yet."""
    from moecc_backends.xla import ahead as topology

    machine = parse_machine(case.machine)
    os.environ.update(environment(machine))
    from moecc_backends.xla.census import census
    from moecc_backends.xla.train.step import make_step

    recipe, graph = model_of(case)
    spec = step_spec(graph, recipe, machine.kind)
    step = make_step(train_graph(graph, recipe), spec, topology.devices(machine))
    made = topology.compile_lowered(topology.lower(*step, machine), machine)
    found = census(made.hlo)
    return {
        "seconds": round(made.seconds, 1),
        "passes": str(train_passes(graph, recipe)),
        "compiled": {
            "flops": found.flops, **made.memory, "collectives": found.by_kind(),
            "opaque": found.opaque, "unknown_loops": found.unknown_loops,
        },
        "planned": planned(case),
    }  # fmt: skip


BOUNDS = {
    "flops": 0.02, "collectives": 0.05, "arguments_bytes": 0.01, "temporaries_bytes": 0.25,
    "peak_bytes": 0.15,
}  # fmt: skip
"""How far a plan may be from the compiler, as in benchmarks/plan_vs_xla.py."""


def off(line: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return each figure of the compiler, and how far the plan is from it.

    None where a census of the program misses products: those of opaque kernels, and of loops over
    the rows that experts got.
    """
    found = {}
    for kind in BOUNDS:
        said, planned = (_figure(line[side], kind) for side in ("compiled", "planned"))
        is_hidden = kind == "flops" and _hidden(line)
        found[kind] = said, None if is_hidden or not said else planned / said - 1
    return found


def _hidden(line: dict[str, Any]) -> str:
    """Return what hides products of the program, or nothing."""
    made = line["compiled"]
    return "kernels hidden" if made["opaque"] else "loops hidden" if made["unknown_loops"] else ""


def _figure(side: dict[str, Any], kind: str) -> float:
    if kind == "collectives":
        return float(sum(of_kind["bytes"] for of_kind in side[kind].values()))
    return float(side[kind])


def run(name: str) -> dict[str, Any]:
    """Return what came of a case: its compiler may abort."""
    command = [sys.executable, "-m", "tests.proof.recipes", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"case": name, "exit_code": done.returncode, "said": lines[-8:]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"case": name, **found}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what is asked for and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--one", choices=CASES, help="in this process")
    parser.add_argument("--out", type=Path, help="a file of lines; what it has is not done again")
    asked = parser.parse_args(argv)
    if asked.one:
        print(json.dumps(compiled(CASES[asked.one])))
        return 0
    unknown = [name for name in asked.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; cases: {', '.join(CASES)}")
    kept = asked.out.read_text("utf-8").splitlines() if asked.out and asked.out.exists() else []
    known = {line["case"]: line for line in map(json.loads, kept) if "exit_code" not in line}
    for name in asked.cases or CASES:
        if name not in known:
            known[name] = run(name)
            print(json.dumps(known[name]), flush=True)
        if asked.out:
            lines = (json.dumps(known[n]) for n in CASES if n in known)
            asked.out.write_text("\n".join(lines) + "\n", "utf-8")
    return int(any("exit_code" in line for line in known.values()))


if __name__ == "__main__":
    sys.exit(main())
