"""A process that runs commands of one checkout, each in a forked child.

It runs on the interpreter of the checkout and reads jobs from stdin, one JSON object a line:
`argv` (a command line) or `code` (a Python text), `cwd`, `env`, `stdout`, `stderr` and `seconds`.
Each is answered by one line on stdout: the exit code, or null where the time ran out.

The command line is the console script `moecc` of the installed distribution, whatever module has
it.  Importing jax and NumPy takes longer than most jobs, so a child that runs one conversion first
reports which modules it imported, and this process imports them for all later children.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import warnings
from importlib.metadata import distribution
from typing import Any

Job = dict[str, Any]


def console_script() -> Any:
    """Return the function behind the console script `moecc`."""
    (script,) = (
        e
        for e in distribution("moecc").entry_points
        if e.group == "console_scripts" and e.name == "moecc"
    )
    return script.load()


def preload(job: Job) -> None:
    """Import what `job` imports, without starting anything that it starts."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _redirect(job)
        with contextlib.suppress(BaseException):
            _call(job)
        with os.fdopen(writer, "w") as pipe:
            json.dump([*sys.modules], pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        names = json.load(pipe)
    os.waitpid(pid, 0)
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def run(job: Job) -> int | None:
    """Run `job` in a child and return its exit code; null where it takes too long."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _redirect(job)
        _exit(_call(job))
    deadline = time.monotonic() + job["seconds"]
    pause = 0.002
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _redirect(job: Job) -> None:
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)


def _call(job: Job) -> int:
    try:
        if "code" in job:
            exec(compile(job["code"], "<job>", "exec"), {"__name__": "__main__"})
            return 0
        sys.argv = ["moecc", *job["argv"]]
        result = console_script()()
        return result if isinstance(result, int) else 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


def _exit(code: int) -> None:
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code & 0xFF)


def main() -> None:
    """Answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", message=r".*os\.fork\(\)")
    console_script()
    for index, line in enumerate(sys.stdin):
        job = json.loads(line)
        if index == 0:
            preload(job)
            gc.collect()
            gc.freeze()
            code: int | None = 0
        else:
            code = run(job)
        answers.write(json.dumps(code) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
