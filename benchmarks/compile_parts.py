"""What of a training step costs its compilation: its parts, compiled apart for a slice of TPUs.

    python benchmarks/compile_parts.py [PART…] [--option KEY=VALUE] [--out FILE.md]

The step is that of ST-MoE-32B over 1,024 devices.  Parts are loss and gradients (``gradients``),
norm and update (``update``), all of it (``step``), and the step whose equal layers within a block
are written out (``no-loop``).  Each is compiled in a process of its own, with the extras ``tpu``
and ``train``.  A row has the lines of StableHLO; seconds, and processor seconds in brackets, of
planning, tracing and lowering, and of compiling; seconds of the compiler's stages, as libtpu logs
them (passes over HLO; its backend, which makes instructions of a core of what they leave; code);
the most memory of the process; FLOPs and temporaries of a device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

STAGES = ("HLO_PASSES", "BACKEND_PASSES", "CODE_GENERATION")

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

HEAD = [
    "part", "StableHLO lines", "lowered in", "compiled in", "HLO passes", "backend", "code",
    "host memory", "TFLOPs", "temporaries, GB",
]  # fmt: skip


def prepared() -> tuple[Any, Any]:
    """Return the step, as ``moecc compile`` makes it, and the machine."""
    from moecc_backends.xla.ahead import devices
    from moecc_backends.xla.train.step import make_train_step

    from moecc.ahead.request import Request
    from moecc.ahead.worker import prepare
    from moecc.plan.step import ProgramConfig
    from moecc.train.settings import StepSpec

    made = prepare(Request(
        model="preset:st-moe-32b", machine="tpu:v4:8x8x8", config=ProgramConfig(
            batch_tokens=1282048, sequence="512,114", optimizer="adafactor", remat="full",
            mesh="data=64,model=16", dense_weights="split",
        ),
    ))  # fmt: skip
    job = made.job
    spec = StepSpec(job.sizes, job.request.config, job.update, platform=job.machine.kind)
    return make_train_step(made.graph, spec, devices(job.machine)), job.machine


def part_of(step: Any, part: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the jitted function of a part of `step`, and what it takes."""
    import jax
    from moecc_backends.xla.train.step import gradient_norm

    state, batch, key, rate = step.arguments
    trained = {n: state["params"][n] for n in step.trained}
    fixed = {n: a for n, a in step.model_params(state).items() if n not in trained}
    if part == "gradients":
        kept = {n: a.sharding for n, a in trained.items()}
        return jax.jit(step.gradients, out_shardings=(kept, None)), (trained, fixed, batch, key)
    if part == "update":
        given = (trained, state["moments"], trained, rate)
        kept = jax.tree.map(lambda a: a.sharding, (trained, state["moments"]))

        def update(trained: Any, moments: Any, slopes: Any, rate: Any) -> Any:
            norm = gradient_norm(slopes)
            return *step.update(trained, moments, slopes, norm, rate), norm

        return jax.jit(update, donate_argnums=(0, 1), out_shardings=(*kept, None)), given
    return step.function, step.arguments


def work(part: str, options: dict[str, str]) -> dict[str, Any]:
    """Return the figures of a part, compiled in this process."""
    from moecc_backends.xla.ahead import host_peak_bytes, lower
    from moecc_backends.xla.census import census
    from moecc_backends.xla.lower import scan

    from moecc.ahead.worker import trimmed

    if part == "no-loop":
        from moecc_backends.xla.lower.scan import segments

        scan.pieces_of = segments
    with trimmed():
        marks = [(time.perf_counter(), time.process_time())]
        step, machine = prepared()
        lowered = lower(*part_of(step, part), machine)
        lines = lowered.as_text().count("\n")
        marks.append((time.perf_counter(), time.process_time()))
        compiled = lowered.compile(compiler_options=options or None)
        marks.append((time.perf_counter(), time.process_time()))
    found = census(compiled.as_text())
    clock, processor = ([b - a for a, b in pairwise(t)] for t in zip(*marks, strict=True))
    return {
        "lines": lines, "lower": (clock[0], processor[0]), "compile": (clock[1], processor[1]),
        "host": host_peak_bytes(), "flops": found.flops,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip


def stages(log: str) -> list[float]:
    """Return the seconds of the compiler's stages, of its log."""
    found = dict.fromkeys(STAGES, 0.0)
    for name, minutes, number, unit in re.findall(
        r"(\w+) stage duration: (?:(\d+)m)?([\d.]+)(s|ms|us)", log
    ):
        if name in found:
            found[name] += 60 * int(minutes or 0) + float(number) * SECONDS[unit]
    return list(found.values())


def row(part: str, found: dict[str, Any], log: str) -> str:
    """Return a row of the table."""
    cells = [part, f"{found['lines']:,}"]
    cells += [f"{c:.0f} s ({p:.0f})" for c, p in (found["lower"], found["compile"])]
    cells += [f"{s:.0f} s" for s in stages(log)]
    cells += [
        f"{found['host'] / 1e9:.2f} GB", f"{found['flops'] / 1e12:.1f}",
        f"{found['temporaries'] / 1e9:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


PARTS = ("update", "gradients", "step", "no-loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without one")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE, of XLA")
    parser.add_argument("--out", type=Path, help="where the table goes, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    if given.worker:
        print(json.dumps(work(given.parts[0], dict(o.split("=", 1) for o in given.option))))
        return
    from moecc.jobs.compile import allocator_environment

    rows = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(rows), flush=True)
    logged = {
        **os.environ, **allocator_environment(), "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0",
    }  # fmt: skip
    for part in given.parts or PARTS:
        command = [sys.executable, __file__, part, "--worker"]
        command += [f"--option={option}" for option in given.option]
        done = subprocess.run(command, capture_output=True, text=True, env=logged)
        if done.returncode:
            sys.exit(f"{part}: {done.stderr.strip().splitlines()[-1]}")
        rows.append(row(part, json.loads(done.stdout.splitlines()[-1]), done.stderr))
        print(rows[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
