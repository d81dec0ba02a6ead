"""The first process that fails, dies or hangs ends all, within a bound and with a message."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moecc.jobs.launch import Ended, Supervisor
from tests.support.commands import is_running

BOUND_SECONDS = 5

ME = "import os, sys, time; me = int(os.environ['MOECC_PROCESS'])\n"


def run(code, processes=3, **options):
    """Run a program; return how it ended, what was said, and exit codes, which all must have."""
    said = []
    command = [sys.executable, "-c", ME + textwrap.dedent(code)]
    supervisor = Supervisor(command, processes, say=said.append, **options)
    ended = supervisor.run()
    codes = [process.popen.poll() for process in supervisor.processes]
    assert None not in codes
    return ended, said, codes


def test_processes_know_their_places_and_the_first_has_the_output(capfdbinary):
    ended, said, _ = run(
        """
        print("output of", me, os.environ["MOECC_PROCESSES"])
        print("[Gloo] Rank [Gloo] Rank 1 is connected to 3 peer ranks. Expected number: 3")
        print("0 is connected to 3 peer ranks. Expected number: 3")
        print("line of", me, file=sys.stderr)
        """
    )
    assert ended == Ended(0)
    assert sorted(said) == [f"[{i}] line of {i}" for i in range(3)]
    assert capfdbinary.readouterr().out == b"output of 0 3\n"


def test_one_that_fails_ends_the_others_with_its_code():
    start = time.monotonic()
    ended, said, _ = run("sys.exit(3) if me == 1 else time.sleep(60)")
    assert time.monotonic() - start < BOUND_SECONDS + 5
    assert ended.exit_code == 3
    assert said[-1] == "error: process 1 of 3 failed with exit code 3; the others were ended"


def test_one_that_is_killed_ends_the_others():
    ended, said, _ = run("os.kill(os.getpid(), 9) if me == 2 else time.sleep(60)")
    assert ended.exit_code == 4
    assert "process 2 of 3 was ended by SIGKILL" in said[-1]


def test_one_that_refuses_to_end_is_killed(tmp_path):
    ended, _, codes = run(
        f"""
        import signal
        here = {str(tmp_path)!r}
        if me == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open(here + "/ready", "w").close()
            time.sleep(60)
        while not os.path.exists(here + "/ready"):
            time.sleep(0.01)
        sys.exit(1)
        """,
        processes=2,
    )
    assert ended.exit_code == 1
    assert codes[1] == -signal.SIGKILL


@pytest.mark.slow
def test_one_that_makes_no_step_ends_all():
    """A stopped process neither fails nor finishes; the others go on reporting steps."""
    ended, said, _ = run(
        """
        from moecc.launch.processes import Watchdog
        watchdog = Watchdog({})
        for step in range(600):
            watchdog.beat(str(step))
            if me == 1 and step == 3:
                import signal
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.05)
        """,
        stuck_seconds=3.0,
    )
    assert ended.exit_code == 4
    assert "process 1 of 3 made no step for 3 s" in said[-1]


@pytest.mark.parametrize("phase", ["start", "step", "evaluation", "save"])
def test_the_watchdog_ends_a_process_that_hangs_in_a_phase(phase):
    code = f"""
        from moecc.launch.processes import LIMITS, watchdog_of_environment
        os.environ |= dict.fromkeys(LIMITS.values(), "60") | {{LIMITS[{phase!r}]: "0.3"}}
        watchdog = watchdog_of_environment()
        watchdog.beat("the first step")
        watchdog.enter({phase!r})
        def hangs(): time.sleep(60)
        hangs()
    """
    ended, said, _ = run(code, processes=1)
    assert ended.exit_code == 4
    text = "\n".join(said)
    assert f"no progress for 0.3 s in the phase {phase} (MOECC_{phase.upper()}_SECONDS)" in text
    assert "in hangs" in text
    # The last words of the process are the error, not a stack.
    last = [line for line in said if line.startswith("[0]")][-1]
    assert last.endswith("the last one was: the first step")


def test_long_phases_have_limits_of_their_own():
    code = """
        os.environ["MOECC_STEP_SECONDS"] = "0.3"
        from moecc.launch.processes import watchdog_of_environment
        watchdog = watchdog_of_environment()
        for phase in ("start", "evaluation", "save"):
            watchdog.enter("step")
            watchdog.enter(phase)
            time.sleep(0.9)
    """
    assert run(code, processes=1, stuck_seconds=0.5)[0] == Ended(0)


@pytest.mark.parametrize(("options", "limit"), [((), "77"), (("--step-seconds", "5"), "5")])
def test_the_limit_of_steps_is_the_option_or_the_variable(monkeypatch, options, limit):
    monkeypatch.setenv("MOECC_STEP_SECONDS", "77")
    code = "import os; print(os.environ['MOECC_STEP_SECONDS'])"
    words = ["launch", "local", "-n", "1", *options, "--", "python", "-c", code]
    done = subprocess.run([sys.executable, "-m", "moecc", *words], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{limit}\n", 0), done.stderr


def test_an_interrupt_during_the_start_leaves_no_process(monkeypatch):
    """It may come after a process is started, and before the supervisor knows of it."""
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)
            if len(started) == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("moecc.jobs.launch.subprocess.Popen", Interrupted)
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    try:
        with pytest.raises(KeyboardInterrupt):
            Supervisor(sleeping, 2, say=print).run()
        assert not any(is_running(process.pid) for process in started)
    finally:
        for process in started:
            process.kill()


def test_a_reader_that_has_exited_is_no_traceback():
    golden = Path(__file__).parents[1] / "golden" / "llama_gqa"
    words = f"{sys.executable} -m moecc launch local -n 2 -- import {golden} | head -n 1"
    done = subprocess.run(["/bin/sh", "-c", words], capture_output=True, text=True, timeout=120)
    assert done.stdout == "moecc 1\n"
    assert "Traceback" not in done.stderr


def test_a_watchdog_that_hears_steps_does_not_bite():
    code = """
        from moecc.launch.processes import Watchdog
        with Watchdog({"step": 5.0}) as watchdog:
            for step in range(5):
                watchdog.beat(str(step))
        time.sleep(0.2)
    """
    assert run(code, processes=1)[0] == Ended(0)
