"""``python -m tests.kill.trainings``: kill trainings at calls that change storage; go on with them.

    python -m tests.kill.trainings [--kills N] [--storage local s3] [--out FILE]

A run on this machine is killed at calls of its process that change files: creations, writes,
renames, removals and synchronisations, those of libraries in C++ included. A run in an S3 server is
killed at requests that change the bucket. After each kill every step that is there must be as its
digests say. The command that began the run, given once more, continues it, and is killed again, up
to four times; the one that is left alone must come to the journal and the state, bit for bit, of
the run that nobody disturbed. Half of those killed in the store go on on another machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fault_proxy import Fault, FaultProxy

from moecc.errors import MoeccError
from moecc.formats.run import check_step, is_run, saved_steps
from moecc.support.untyped import JsonDict
from tests.reports import about
from tests.train.tiny import make_recipe, same_runs

RUN = "steps = 4\nsave_steps = 2\nkeep = 1"
STORAGES = ["local", "s3"]
SEED, LONGEST_CHAIN = 5, 4
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key-of-a-rig",
    "AWS_SECRET_ACCESS_KEY": "secret-of-a-rig",
    "AWS_DEFAULT_REGION": "us-east-1",
}
CHANGING = frozenset({"PUT", "POST", "DELETE"})


class Spawner:
    """Runs commands in processes that have imported everything, forked off one that has.

    Args:
      folder: a folder for its files.
    """

    def __init__(self, folder: Path):
        library = folder / "storage_calls.so"
        source = Path(__file__).with_name("storage_calls.c")
        build = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.child = 0

    def run(self, *words: object, **variables: str) -> tuple[int, int, str]:
        """Return exit code, or minus the signal, the number of calls, and the output."""
        self._process.stdin.write(json.dumps([[*map(str, words)], variables]) + "\n")
        self._process.stdin.flush()
        self.child = self._read()
        code, calls, text = self._read()
        return code, calls, text

    def kill(self):
        """Kill the command that runs."""
        os.kill(self.child, signal.SIGKILL)

    def close(self):
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self):
        return json.loads(self._process.stdout.readline())


def serve():
    """Run the commands of a `Spawner`, each in a child."""
    import jax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import s3fs  # noqa: F401
    from moecc_backends.xla.train import loop  # noqa: F401

    from moecc.cli.main import main

    with TemporaryDirectory(prefix="moecc-serve-") as folder:
        output, counts = Path(folder, "output"), Path(folder, "counts")
        for line in sys.stdin:
            words, variables = json.loads(line)
            counts.write_text("0")
            child = os.fork()
            if child == 0:
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.environ.update(variables)
                code = main(words)
                os.environ["MOECC_KILL_BELOW"] = ""
                counts.write_text(str(ctypes.CDLL(None).moecc_storage_calls()))
                os._exit(code)
            print(json.dumps(child), flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            text = output.read_text("utf-8", "replace")
            print(json.dumps([code, int(counts.read_text()), text]), flush=True)


@dataclass
class Result:
    """What kills at one storage led to.

    Attributes:
      calls: at which a process can be killed, in the run that nobody disturbed.
      points: their numbers, in its process, where one was killed.
      resumed: of the killed processes, those that went on with a run.
      finished: runs that came to their end after kills, with the same journal and state.
      failures: what was wrong.
    """

    calls: int = 0
    points: list[int] = field(default_factory=list)
    resumed: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)


def step_faults(run: Path) -> Iterator[str]:
    """Yield what is wrong with the steps of a run."""
    for step in saved_steps(run) if is_run(run) else ():
        try:
            check_step(run, step)
        except MoeccError as error:
            yield f"step {step.number} is not as it was saved: {error}"


class LocalStorage:
    """A run in a folder, killed at calls of its process.

    Args:
      base: a folder with the recipe.
      spawner: runs commands.
    """

    def __init__(self, base: Path, spawner: Spawner):
        self._spawner, self._run = spawner, base / "local" / "run"
        self._words = ("train", base / "recipe.toml", "--out", self._run)

    def fresh(self):
        """Remove the run, and what is left beside it."""
        shutil.rmtree(self._run.parent, ignore_errors=True)
        self._run.parent.mkdir()

    def train(self, at: int | None) -> tuple[int, int, str]:
        """Train, killed at a call; return the exit code, the number of calls, and the output."""
        # What is beside the run, the folder in which it is made, is below the same prefix.
        variables = {"MOECC_KILL_BELOW": f"{self._run.parent}/"}
        variables |= {} if at is None else {"MOECC_KILL_AT": str(at)}
        return self._spawner.run(*self._words, **variables)

    def copy(self) -> Path:
        """Return the run in a folder."""
        return self._run


class StoredStorage:
    """A run in an S3 server, killed at requests that change the bucket.

    Args:
      base: a folder with the recipe.
      spawner: runs commands.
      system: fsspec's access to the server.
      proxy: the proxy before it.
    """

    def __init__(self, base: Path, spawner: Spawner, system, proxy: FaultProxy):
        self._base, self._spawner, self._system, self._proxy = base, spawner, system, proxy
        self._words = ("train", base / "recipe.toml", "--out", "s3://bucket/run")
        self._variables = {
            **VARIABLES, "AWS_ENDPOINT_URL": proxy.url, "XDG_CACHE_HOME": str(base / "cache")
        }  # fmt: skip

    def fresh(self):
        """Remove the run, and what the machine has of it."""
        self._system.invalidate_cache()
        if self._system.exists("bucket/run"):
            self._system.rm("bucket/run", recursive=True)
        shutil.rmtree(self._base / "cache", ignore_errors=True)

    def train(self, at: int | None) -> tuple[int, int, str]:
        """Train, killed at a request; return the exit code, the number of points, and the output.

        A request has two: killed before it comes to the server, and after, without an answer.
        After every second request another machine goes on.
        """
        if at is None:
            self._proxy.expect(Fault(methods=CHANGING))
        else:
            kind = "unanswered" if at % 2 else "reset"
            kill = Fault(kind, at // 2 + 1, before=self._spawner.kill, methods=CHANGING)
            self._proxy.expect(kill)
        code, _, text = self._spawner.run(*self._words, **self._variables)
        count = 2 * self._proxy.count
        if at is not None and at % 4 > 1:
            shutil.rmtree(self._base / "cache", ignore_errors=True)
        return code, count, text

    def copy(self) -> Path:
        """Return a copy of the run."""
        run = self._base / "copy"
        shutil.rmtree(run, ignore_errors=True)
        self._system.invalidate_cache()
        if self._system.exists("bucket/run"):
            self._system.get("bucket/run", str(run), recursive=True)
        return run


def kill_chain(
    storage: LocalStorage | StoredStorage, whole: Path, points: list[int], result: Result
):
    """Kill a training, and those that continue it, at the next points; then let one end.

    Args:
      storage: of the run.
      whole: a run that nobody disturbed.
      points: numbers of calls; those that were used are removed.
      result: receives what is found.
    """
    storage.fresh()
    for _ in range(LONGEST_CHAIN):
        if not points:
            break
        at = points.pop()
        is_resumed = is_run(storage.copy())
        code, _, text = storage.train(at)
        where = f"call {at}, {'resumed' if is_resumed else 'fresh'}"
        if code == 0:
            if is_resumed:  # it made fewer calls than a fresh run
                points.insert(0, at)
            break
        if code != -signal.SIGKILL:
            result.failures.append(f"{where}: exit code {code}: {text}")
            return
        result.points.append(at)
        result.resumed += is_resumed
        result.failures += [f"{where}: {fault}" for fault in step_faults(storage.copy())]
    code, _, text = storage.train(None)
    if code or not same_runs(storage.copy(), whole):
        result.failures.append(f"after {where}: exit code {code}, or another curve: {text}")
    else:
        result.finished += 1


@contextmanager
def s3_server() -> Iterator[tuple[Any, FaultProxy]]:
    """Yield fsspec's access to a server on this machine, and a proxy before it."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    port = server.get_host_and_port()[1]
    os.environ.update(VARIABLES)
    system = fsspec.filesystem(
        "s3", skip_instance_cache=True, client_kwargs={"endpoint_url": f"http://127.0.0.1:{port}"}
    )
    system.mkdir("bucket")
    try:
        yield system, FaultProxy(port)
    finally:
        server.stop()


def prove(names: Sequence[str], kills: int, seconds: float, out: Path | None) -> JsonDict:
    """Kill trainings; return what was found with the date and the machine.

    Args:
      names: of the storages.
      kills: of each, at most; each at another call.
      seconds: after which no further run is begun.
      out: the file of the record, which is written after each run.
    """
    start, results = time.monotonic(), {name: Result() for name in names}

    def report():
        content = {
            **about(),
            "server": f"moto {version('moto')}",
            "seconds": round(time.monotonic() - start),
            "storages": {
                name: {"kills": len(r.points), **vars(r), "points": sorted(r.points)}
                for name, r in results.items()
            },
        }
        if out is not None:
            out.write_text(json.dumps(content) + "\n")
        return content

    with TemporaryDirectory(prefix="moecc-trainings-") as folder, ExitStack() as opened:
        base = Path(folder)
        recipe = make_recipe(base, RUN)
        # Each process lowers what it runs, and compiles none of it again.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        system, proxy = opened.enter_context(s3_server())
        spawner = Spawner(base)
        opened.callback(spawner.close)
        code, _, text = spawner.run("train", recipe, "--out", base / "whole")
        assert code == 0, text
        storages = {
            "local": LocalStorage(base, spawner),
            "s3": StoredStorage(base, spawner, system, proxy),
        }
        points = {}
        for name, result in results.items():
            storages[name].fresh()
            code, result.calls, text = storages[name].train(None)
            assert code == 0, text
            assert same_runs(storages[name].copy(), base / "whole")
            points[name] = sorted({n * result.calls // kills for n in range(kills)})
            random.Random(SEED).shuffle(points[name])
        while any(points.values()) and time.monotonic() - start < seconds:
            for name, result in results.items():
                if points[name]:
                    kill_chain(storages[name], base / "whole", points[name], result)
                    print(f"{name}: {len(result.points)} kills, {len(points[name])} to come, "
                          f"{len(result.failures)} failures", file=sys.stderr)  # fmt: skip
            report()
    return report()


def main() -> int:
    """Run, print, and return 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100, help="kills of each storage, at most")
    parser.add_argument("--storage", nargs="*", choices=STORAGES, default=STORAGES)
    parser.add_argument("--seconds", type=float, default=inf, help="after which none is begun")
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    parser.add_argument("--serve", action="store_true", help="run commands of standard input")
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return 0
    report = prove(asked.storage, asked.kills, asked.seconds, asked.out)
    print(json.dumps(report, indent=1))
    return 1 if any(result["failures"] for result in report["storages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
