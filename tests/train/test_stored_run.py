"""Runs and token folders in an S3 server on this machine: trained, lost, continued, read."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint")

from stores import said, store

from moecc.formats.run import saved_steps

from .tiny import make_recipe, same_runs, set_options, train

__all__ = ["store"]  # a fixture

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN = "steps = 6\nsave_steps = 2\nevaluate_steps = 3\nkeep = 2"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder where runs of a store are trained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def recipe(store, tmp_path_factory):
    """A recipe whose tokens are in the store, with a run of it on this machine, ``whole``."""
    folder = tmp_path_factory.mktemp("stored")
    recipe = make_recipe(folder, RUN)
    train(recipe, folder / "whole")
    store.put(str(folder / "tokens"), "bucket/tokens", recursive=True)
    shutil.rmtree(folder / "tokens")
    recipe.write_text(recipe.read_text().replace("tokens/", "s3://bucket/tokens/"))
    return recipe


def run_command(capsys, *words):
    """Run a command to its end, and return all its output."""
    code, text = said(capsys, *words)
    assert code == 0, text
    return text


def download(store, name, folder):
    """Return a copy of a run of the store."""
    store.invalidate_cache()
    store.get(f"bucket/{name}", str(folder), recursive=True)
    return folder


def test_a_run_in_a_store_is_that_of_a_folder(store, recipe, cache, tmp_path, capsys):
    address = "s3://bucket/run"
    assert str(cache) not in run_command(capsys, "train", recipe, "--out", address)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert same_runs(download(store, "run", tmp_path / "run"), recipe.parent / "whole")
    assert [s.number for s in saved_steps(tmp_path / "run")] == [4, 6]
    for words in (
        ("train", recipe, "--out", address),
        ("verify", address), ("verify", f"{address}@4"), ("inspect", f"{address}@best"),
        ("evaluate", address, "--data", "s3://bucket/tokens/heldout", "--batches", "1"),
        ("convert", address, "s3://bucket/exported", "-p", "", "--to", "auto"),
        ("report", address, "--html", tmp_path / "run.html"),
        ("train", recipe, "--fork", f"{address}@4", "--out", "s3://bucket/fork"),
        ("train", f"{address}/recipe.toml", "--fork", f"{address}@4", "--set", "run.seed=5",
         "--out", "s3://bucket/from-store"),
    ):  # fmt: skip
        run_command(capsys, *words)
    code, text = said(capsys, "train", recipe, "--out", address, "--set", "run.seed=5")
    assert code == 1
    assert f"{address}/recipe.toml: the run was begun with another recipe" in text


class Killed(BaseException):
    """The process ends."""


def test_a_run_survives_the_loss_of_its_machine_at_every_upload(
    store, recipe, cache, tmp_path, monkeypatch,
    capsys,
):  # fmt: skip
    import fsspec

    system, address = fsspec.filesystem("s3"), "s3://bucket/lost"
    calls, at = 0, 0

    def ending(call):
        def run(*words, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return call(*words, **options)

        return run

    for name in ("pipe_file", "put_file", "rm_file"):
        monkeypatch.setattr(system, name, ending(getattr(system, name)))
    run_command(capsys, "train", recipe, "--out", address)
    total = calls
    # Orbax divides a state into more or fewer files as its threads run: the total varies.
    for at in (1, 2, total // 3, total // 2, total * 4 // 5):
        store.rm("bucket/lost", recursive=True)
        calls = 0
        with pytest.raises(Killed):
            said(capsys, "train", recipe, "--out", address)
        at = 0
        shutil.rmtree(cache)
        run_command(capsys, "train", recipe, "--out", address)
        run = download(store, "lost", tmp_path / f"lost-{at}-{calls}")
        assert same_runs(run, recipe.parent / "whole")
        steps = {p.name for p in (run / "steps").iterdir()}
        assert steps == {str(s.number) for s in saved_steps(run)}


def test_an_evaluation_that_a_stop_left_out_is_made_where_the_run_goes_on(
    store, recipe, cache, tmp_path, monkeypatch, capsys
):
    from moecc_backends.xla.train.loop import Loop

    from moecc.train.events import Reason

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_evaluate", lambda loop: Reason.TERMINATED)
        assert said(capsys, "train", recipe, "--out", "s3://bucket/stopped")[0] == 143
    last = saved_steps(download(store, "stopped", tmp_path / "stopped"))[-1]
    assert (last.number, last.loss) == (3, None)
    shutil.rmtree(cache)
    run_command(capsys, "train", recipe, "--out", "s3://bucket/stopped")
    runs = (download(store, "stopped", tmp_path / "run"), recipe.parent / "whole")
    assert same_runs(*runs)
    losses, expected = ({s.number: s.loss for s in saved_steps(run)} for run in runs)
    assert losses == expected


def processes(base, words):
    """Start two processes of one run, each with a home, a cache and a folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for number in range(2):
        home = base / f"machine-{number}"
        home.mkdir(parents=True, exist_ok=True)
        variables = {
            **os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"),
            "TMPDIR": str(home), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu",
            "MOECC_COORDINATOR": f"127.0.0.1:{port}", "MOECC_PROCESSES": "2",
            "MOECC_PROCESS": str(number), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "moecc", *map(str, words)]
        started.append(
            subprocess.Popen(command, env=variables, cwd=home, stderr=subprocess.PIPE, text=True)
        )
    return started


def ended(started):
    """Wait for processes; return the exit code and the messages of each."""
    texts = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, texts, strict=True)]


def test_machines_that_share_no_folder_train_one_run(store, recipe, tmp_path, capsys):
    settings = ('mesh.mesh="fsdp=2"', 'mesh.rules=["fsdp"]', "run.export_steps=6",
                "run.export_to=auto")  # fmt: skip
    words = ("train", recipe, "--out", "s3://bucket/two", *set_options(*settings))

    def train_together():
        for code, text in ended(processes(tmp_path, words)):
            assert code == 0, text

    train_together()
    whole = download(store, "two", tmp_path / "two")
    (last,) = (step for step in saved_steps(whole) if step.number == 6)
    parts = [n for n in last.facts.files if n.split("/")[1:2] == ["c"]]
    assert parts, "each process wrote chunks"
    assert not list(whole.glob("steps/*/part-*"))
    assert not [p for p in tmp_path.glob("machine-*/cache/moecc/**/*") if p.is_file()]
    store.rm("bucket/two", recursive=True)

    # Machine 1 dies once the first step is there; both come back with other disks.
    started = processes(tmp_path, words)
    while not store.exists("bucket/two/steps/2/step.json"):
        time.sleep(0.02)
        store.invalidate_cache()
        assert started[1].poll() is None
    started[1].kill()
    assert ended(started)[0][0] != 0
    for number, name in ((0, "moved-1"), (1, "moved-0")):
        (tmp_path / f"machine-{number}").rename(tmp_path / name)
    for number in (0, 1):
        (tmp_path / f"moved-{number}").rename(tmp_path / f"machine-{number}")
    train_together()
    assert same_runs(download(store, "two", tmp_path / "again"), whole)
    for command in (
        ("verify", "s3://bucket/two"), ("verify", "s3://bucket/two@best"),
        ("evaluate", "s3://bucket/two", "--data", "s3://bucket/tokens/heldout", "--batches", "1"),
        ("convert", "s3://bucket/two", tmp_path / "model", "-p", "", "--to", "auto"),
        ("verify", "s3://bucket/two/exports/6"),
    ):  # fmt: skip
        run_command(capsys, *command)
