"""Runs that are killed, terminated or out of disk go on as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moecc.formats.run import saved_steps

pytest.importorskip("orbax.checkpoint")

from .tiny import forget, journal, make_recipe, same_runs  # noqa: RUF100, E402

pytestmark = pytest.mark.slow

RUN = "steps = 24\nsave_steps = 3\nevaluate_steps = 8\nkeep = 2"
KILLS = 20


def command(*words):
    return [sys.executable, "-m", "moecc", *map(str, words)]


def start(words):
    one_device = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.Popen(
        words, env=one_device, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(words):
    process = start(words)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def killed_after(words, seconds):
    """Run a command and kill it with all of its processes; return whether it was still running."""
    process = start(words)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recipe, and a run of it that nobody disturbed."""
    folder = tmp_path_factory.mktemp("kill")
    recipe = make_recipe(folder, RUN)
    finish(command("train", recipe, "--out", folder / "whole"))
    return folder


@pytest.fixture(scope="module")
def seconds(folder):
    """How long a run takes whose programs are compiled."""
    started = time.monotonic()
    finish(command("train", folder / "recipe.toml", "--out", folder / "timed"))
    return time.monotonic() - started


def test_killed_at_random_moments(folder, seconds, tmp_path):
    """Several runs, `KILLS` times together; each is resumed until it ends."""
    rng, kills, run = random.Random(5), 0, tmp_path / "run"
    resumed = command("train", "--resume", run)
    while kills < KILLS:
        words = command("train", folder / "recipe.toml", "--out", run)
        # Not more often: a machine that has become slower might never get to the end.
        while kills < KILLS and killed_after(words, rng.uniform(0.0, seconds)):
            kills += 1
            if (run / "lineage.json").is_file():
                words = resumed
            else:
                # It was killed before the folder was there, or while it was made.
                shutil.rmtree(tmp_path / ".run.moecc-partial", ignore_errors=True)
        finish(resumed if (run / "lineage.json").is_file() else words)
        assert same_runs(run, folder / "whole")
        shutil.rmtree(run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_step_and_saved(folder, tmp_path, number, code):
    run = tmp_path / "run"
    process = start(command("train", folder / "recipe.toml", "--out", run))
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert saved_steps(run)[-1].number == max(line["step"] for line in journal(run))
    finish(command("train", "--resume", run))
    assert same_runs(run, folder / "whole")


def test_a_full_disk_loses_nothing(folder, tmp_path):
    run = tmp_path / "run"

    # Less than the arrays of a checkpoint, more than the journal.  Python ignores SIGXFSZ; without
    # -B it would write bytecode of what it imports, cut off at the limit.
    limited = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "os.execv(sys.executable, [sys.executable, '-B', *sys.argv[1:]])\n"
    )
    finish(command("train", folder / "recipe.toml", "--out", run))
    first = saved_steps(run)[0].number
    forget(run, first)
    resumed = command("train", "--resume", run)
    python, *words = resumed
    process = start([python, "-c", limited, *words])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert err.count("error:") == 1
    assert "a checkpoint cannot be written" in err
    assert [step.number for step in saved_steps(run)] == [first]
    finish(resumed)
    assert same_runs(run, folder / "whole")
