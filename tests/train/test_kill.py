"""Runs that are killed, terminated or out of disk go on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moecc.formats.run import saved_steps

pytest.importorskip("jax")
pytest.importorskip("orbax.checkpoint")

from .tiny import make_recipe, same_runs  # noqa: RUF100, E402

pytestmark = pytest.mark.slow

RUN = "steps = 24\nsave_steps = 3\nevaluate_steps = 8\nkeep = 2"
KILLS = 20
SEED = 5
ONE = ("XLA_FLAGS", "")
"""One device, whatever the tests have."""


def command(*words):
    return [sys.executable, "-m", "moecc", *map(str, words)]


def start(words):
    environment = {**os.environ, ONE[0]: ONE[1]}
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(words, code=0):
    process = start(words)
    _, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return err


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


def killed_runs(base, seconds, begin, resume):
    """Yield runs that were killed at random moments, `KILLS` times together, and then ended.

    Args:
      base: the folder of the runs.
      seconds: how long one takes that nobody kills.
      begin: the words that begin a run, less its folder.
      resume: those that go on with one.
    """
    rng, kills, number = random.Random(SEED), 0, 0
    while kills < KILLS:
        run, number = base / str(number), number + 1
        words = command(*begin, "--out", run)
        # Not more often: a machine that has become slower might never get to the end.
        while kills < KILLS and killed_after(words, rng.uniform(0.0, seconds)):
            kills += 1
            if (run / "lineage.json").is_file():
                words = command(*resume, "--resume", run)
            else:
                # It was killed before the folder was there, or while it was made.
                shutil.rmtree(base / f".{run.name}.moecc-partial", ignore_errors=True)
        is_there = (run / "lineage.json").is_file()
        finish(command(*resume, "--resume", run) if is_there else words)
        yield run
        shutil.rmtree(run)


def test_killed_at_random_moments(folder, seconds, tmp_path):
    recipe = folder / "recipe.toml"
    for run in killed_runs(tmp_path, seconds, ("train", recipe), ("train",)):
        assert same_runs(run, folder / "whole")


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
    last = saved_steps(run)[-1].number
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert last == max(json.loads(line)["step"] for line in lines)
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
    finish(command("train", folder / "recipe.toml", "--out", run, "--set", "run.steps=24"))
    kept = [step.number for step in saved_steps(run)]
    for step in saved_steps(run)[1:]:
        (step.folder / "step.json").unlink()
    python, *words = command("train", "--resume", run)
    process = start([python, "-c", limited, *words])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    assert err.count("error:") == 1
    assert "a checkpoint cannot be written" in err
    assert [step.number for step in saved_steps(run)] == kept[:1]
    finish(command("train", "--resume", run))
    assert same_runs(run, folder / "whole")
