"""What watching, saving and storing a run costs, in interleaved pairs.

    python benchmarks/run_costs.py [PART…] [--pairs 80] [--out FILE.json]

PART is ``steps``, ``saves`` or ``conversions``; by default all are measured.

``steps``: a decoder of 7.7 M parameters with 4 experts in each of six layers, 1,024 tokens a step.
One process makes a step three ways in turn: *bare*, a program that computes nothing but the loss
and the state; *metrics*, the program of ``moecc train``, whose metrics are read; *watched*, the
loop of ``moecc train`` with journals, TensorBoard, a watchdog, and beats to a supervisor.  All
prepare their batch while the devices compute.  What counts is the processor time of the process,
since machines are shared; its wall time is reported, too.  ``overhead`` is the same of steps of
8 tokens in two narrow layers, which shows what a process does besides computing, in seconds.

``saves``: how long a step's loop waits for a save of that state, where training waits until all is
on the disk, as on CPUs, and where it waits for the copy alone, as on accelerators; beside the time
of a step.

``conversions``: a Llama of 10 layers in bf16 becomes a mixture of 8 experts, from and to folders,
and from and to an S3 server (moto) on the loopback, whose own time is in the wall time.

Exit code 1 if a watched step takes more than 1.01 times the processor time of a bare one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert import EXPERTS, SHAPES, Shape, make_source
from train import CONFIG as TRAINED

Figures = dict[str, Any]

BOUND = 1.01
PARTS = ("steps", "saves", "conversions")
CONFIG = TRAINED | {"intermediate_size": 384}
RECIPE = """
[model]
source = "model"
pipeline = "upcycle{experts=4 top-k=2}"
start = "random"
[data]
train = [{ tokens = "tokens" }]
batch = 8
seq = 128
[routing]
balance = 0.01
z_loss = 0.001
[run]
steps = 1000000
"""
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 4, "intermediate_size": 16}
SHORT = ("data.batch=1", "data.seq=8")
SHAPES["stored"] = Shape(10, 576, 1536, 9, 3, 49152, tied=True)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and processor seconds of this process in `work`."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def compared(seconds: dict[str, list[tuple[float, float]]], base: str) -> Figures:
    """Return medians of wall and processor seconds, and of the ratios of pairs to `base`."""
    return {
        name: {
            kind: {
                "median_seconds": round(statistics.median(s[at] for s in each), 6),
                "ratio": round(statistics.median(
                    s[at] / b[at] for s, b in zip(each, seconds[base], strict=True)
                ), 4),
            }
            for at, kind in enumerate(("wall", "processor"))
        }
        for name, each in seconds.items()
    }  # fmt: skip


# --- a step, and a save of its state


@contextmanager
def training(
    folder: Path, changes: Figures | None = None, sets: tuple[str, ...] = ()
) -> Iterator[tuple[Any, Any]]:
    """Yield the job and the training of a run in `folder`, supervised by this process."""
    from moecc.backend import get_backend
    from moecc.cli.main import main as moecc
    from moecc.jobs.training import new_run, open_source
    from moecc.train.recipe_text import load_recipe

    (folder / "model").mkdir(parents=True)
    config = CONFIG | (changes or {})
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "recipe.toml").write_text(RECIPE)
    docs = Path(__file__).parent.parent / "docs"
    out = ["--tokenizer", "bytes", "--out", str(folder / "tokens")]
    assert moecc(["tokens", str(docs), "--include", "*.md", *out, "--quiet"]) == 0
    reading, writing = os.pipe()
    os.environ |= {"MOECC_BEATS_FD": str(writing), "MOECC_STEP_SECONDS": "600"}
    recipe = load_recipe(str(folder / "recipe.toml"), sets)
    with ExitStack() as opened:
        source = opened.enter_context(open_source(recipe))
        job = new_run(recipe, source, folder / "run")
        yield job, opened.enter_context(get_backend("xla").train(job))
    os.close(reading)
    os.close(writing)


def first_state(job: Any, program: Any) -> Any:
    """Return the state before the first step."""
    from moecc_backends.xla.train.checkpoints import load

    kinds = {**program.abstract_state["params"], **program.abstract_state["bias"]}
    with job.begin() as beginning:
        return program.init(load(program.graph, beginning.weights, beginning.read, kinds))


def stepper(job: Any, program: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Make steps with `step`, each while the next batch is prepared, and yield after each."""
    import jax
    import numpy as np
    from moecc_backends.xla.train.loop import DeviceFeed

    from moecc.train.settings import rate_at

    feed, recipe = DeviceFeed(job.batches, program.abstract_batch), job.recipe
    state, batch, number = first_state(job, program), feed.train(0), 0
    while True:
        key = jax.random.fold_in(jax.random.key(recipe.run.seed), number)
        rate = rate_at(recipe.optimizer, number, recipe.run.steps)
        state, metrics = step(state, batch, key, jax.numpy.float32(rate))
        number += 1
        batch = feed.train(number)
        jax.tree.map(np.asarray, jax.device_get(metrics))
        yield


def measure_steps(job: Any, running: Any, pairs: int) -> Figures:
    """Return the seconds of a step that is bare, has metrics, and is watched."""
    import jax

    from moecc.jobs.train import step_work
    from moecc.train.events import TensorBoard, tracked
    from moecc.train.run import followed

    program = running.first
    bare = jax.jit(lambda *arguments: _with_loss(*program.pure(*arguments)), donate_argnums=(0,))
    events = followed(job, running, lambda: None, step_work(job, 1, None, None))
    ways = {
        "bare": stepper(job, program, bare),
        "metrics": stepper(job, program, program.function),
        "watched": tracked(events, [TensorBoard(job.run, 0)], job.recipe.run.log_steps),
    }
    for way in ways.values():  # compiles
        next(way), next(way)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for pair in range(pairs):
        names = list(ways) if pair % 2 else list(reversed(ways))
        for name in names:
            seconds[name].append(timed(lambda name=name: next(ways[name])))
    ways["watched"].close()
    return compared(seconds, "bare")


def _with_loss(state: Any, metrics: Any) -> tuple[Any, Any]:
    return state, metrics["loss"]


def measure_saves(job: Any, running: Any, pairs: int) -> Figures:
    """Return how long a step waits for a save, by where training goes on."""
    import jax
    from moecc_backends.xla.train.checkpoints import RunCheckpoints, Saver

    from moecc.train.run import Position

    program = running.first
    state = first_state(job, program)
    savers = {"waits": Saver(job.run, 1, beside=False), "beside": Saver(job.run, 1, beside=True)}
    begun = {
        name: RunCheckpoints(job.run, program.graph, lambda step: program.abstract_state,
                             lambda: (state, Position()), saver, job.digest)
        for name, saver in savers.items()
    }  # fmt: skip
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in begun}
    step = 0
    for pair in range(pairs + 1):
        for name, checkpoints in begun.items():
            step += 1
            stall = timed(lambda c=checkpoints, n=step: c.save(state, Position(n), None))
            checkpoints.wait()
            if pair:  # the first makes what writes
                seconds[name].append(stall)
    for saver in savers.values():
        saver.close()
    sizes = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
    return {"state_bytes": sizes, **compared(seconds, "waits")}


# --- a conversion through a store


def child(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall seconds and its processor seconds."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed:\n{said.decode()}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime


def measure_conversions(folder: Path, pairs: int) -> Figures:
    """Return the seconds of a conversion between folders, and between prefixes of an S3 server."""
    import fsspec
    from moto.server import ThreadedMotoServer

    make_source(folder / "source", SHAPES["stored"])
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    store.put(str(folder / "source"), "bucket/source", recursive=True)
    places = {"local": str(folder), "s3": "s3://bucket"}
    passes = ["-p", f"upcycle{{experts={EXPERTS} top-k=2}}", "--to", "mixtral", "--dtype", "bf16"]
    # moto takes a minute to put parts of large objects together, and the client asks again.
    passes += ["--max-shard-bytes", "40000000"]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
    for pair in range(pairs):
        for name in places if pair % 2 else reversed(places):
            where = places[name]
            command = [sys.executable, "-m", "moecc", "convert", f"{where}/source", f"{where}/out"]
            seconds[name].append(child([*command, *passes, "--force"]))
    written = sum(path.stat().st_size for path in (folder / "out").iterdir())
    server.stop()
    return {"written_bytes": written, **compared(seconds, "local")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--pairs", type=int, default=80, help="of steps; a sixteenth of the others")
    parser.add_argument("--out", type=Path, help="also write the figures there")
    options = parser.parse_args()
    parts, few = options.parts or PARTS, max(options.pairs // 16, 1)
    kept = options.out is not None and options.out.exists()
    figures: Figures = json.loads(options.out.read_text()) if kept else {}

    def record(part: str, measured: Figures) -> None:
        """Write what was measured at once, with when and where."""
        figures[part] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "load": round(os.getloadavg()[0], 1),
            **measured,
        }
        if options.out is not None:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="moecc-costs-") as text:
        if {"steps", "saves"} & {*parts}:
            with training(Path(text) / "train") as (job, running):
                if "steps" in parts:
                    record("steps", measure_steps(job, running, options.pairs))
                if "saves" in parts:
                    record("saves", measure_saves(job, running, few))
        if "steps" in parts:
            with training(Path(text) / "narrow", NARROW, SHORT) as (job, running):
                record("overhead", measure_steps(job, running, 20 * options.pairs))
        if "conversions" in parts:
            (folder := Path(text) / "convert").mkdir()
            record("conversions", measure_conversions(folder, few))
    print(json.dumps(figures, indent=1))
    watched = figures.get("steps", {}).get("watched", {}).get("processor", {}).get("ratio", 0)
    return int(watched > BOUND)


if __name__ == "__main__":
    sys.exit(main())
