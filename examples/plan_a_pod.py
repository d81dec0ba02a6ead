"""From a configuration to a program for a pod that is not there: SmolLM2 and Mixtral.

    python examples/plan_a_pod.py [--out FOLDER] [--time-limit SECONDS]

For each model the best plan with full rematerialisation is searched, its training step compiled for
that machine ahead of time, and both are written side by side into a report, ``pods.md``, with a
chart of each plan.  It needs no accelerator and no weights; ``pip install '.[tpu,train]'`` has
the compiler.
``moecc plan`` and ``moecc compile`` do the same from the shell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from script import OUT, console, exit_code, step

from moecc.ahead.request import Request
from moecc.jobs.command import write_whole
from moecc.jobs.compile import compile_in_subprocess, compile_text
from moecc.jobs.plan import plan_step
from moecc.model.open import open_model
from moecc.plan.report import plan_text
from moecc.plan.step import ProgramConfig, StepConfig
from moecc.plan.sweeps import plan_page


@dataclass(frozen=True)
class Pod:
    """A model and the machine that is to train it.

    Attributes:
      model: a preset; a folder with a config.json does as well.
      machine: by name.
      lengths: tokens of a sequence.
    """

    model: str
    machine: str
    lengths: tuple[int, ...]


PODS = (
    Pod("preset:smollm2-135m", "tpu:v5e:2x4", (2048,)),
    Pod("preset:mixtral-8x7b", "tpu:v5p:4x4x4", (4096,)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and compile each pod, and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT / "pods", help="the folder to write into")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for one program")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _write(arguments.out, arguments.time_limit))


def _write(out: Path, time_limit: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pages = ["# Two models and their pods", ""]
    for pod in PODS:
        name = pod.model.removeprefix("preset:")
        with step(f"{name}: a plan on {pod.machine}"):
            plan = planned(pod)
            write_whole(str(out / f"{name}.html"), plan_page(plan, ()).encode(), force=True)
            console.print(plan_text(plan))
        with step(f"{name}: a training step, compiled"):
            program = compiled(pod, plan, time_limit)
            console.print(compile_text(program))
        pages += _page(name, plan, program)
    write_whole(str(out / "pods.md"), "\n".join(pages).encode(), force=True)
    console.print(f"\nThe report is {out / 'pods.md'}")


def planned(pod: Pod) -> dict[str, Any]:
    """Return the best plan for `pod`, and the next best, as ``moecc plan --format json`` does."""
    lengths = ",".join(map(str, pod.lengths))
    with open_model(pod.model) as model:
        config = StepConfig(remat="full", sequence=lengths)
        return plan_step(model.graph, pod.model, pod.machine, config)[0]


def compiled(pod: Pod, plan: dict[str, Any], time_limit: float) -> dict[str, Any]:
    """Return the report on the step that `plan` found best, compiled in a process of its own."""
    best = plan["best"]
    mesh = ",".join(f"{name}={size}" for name, size in best["mesh"].items())
    lengths = None if pod.lengths is None else ",".join(map(str, pod.lengths))
    config = ProgramConfig(sequence=lengths, remat=best["remat"], mesh=mesh)
    request = Request(pod.model, pod.machine, config)
    return compile_in_subprocess(request, time_limit).data


def _page(name: str, plan: dict[str, Any], program: dict[str, Any]) -> Iterator[str]:
    yield from (f"## {name} on {plan['machine']['name']}", "")
    yield from (f"[Memory and time of a step]({name}.html)", "")
    yield from ("The plan:", "", "```text", plan_text(plan), "```", "")
    yield from ("The program:", "", "```text", compile_text(program), "```", "")


if __name__ == "__main__":
    sys.exit(main())
