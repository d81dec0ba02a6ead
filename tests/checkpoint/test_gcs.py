"""Google Cloud Storage, by the server of MOECC_FAKE_GCS, a fake-gcs-server: outputs and runs."""

import os
import shutil
import socket
import subprocess
import time

import pytest

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.formats.manifest import verify_manifest
from moecc.formats.store import mirror
from moecc.formats.upload import StoreOutput
from tests.train.tiny import GOLDEN, make_recipe, same_runs

pytest.importorskip("gcsfs")
pytestmark = pytest.mark.skipif("MOECC_FAKE_GCS" not in os.environ, reason="no MOECC_FAKE_GCS")

CONVERT = ("-p", "upcycle{experts=4 top-k=2}", "--to", "mixtral")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """fsspec's access to a server with a model at ``bucket/tiny``."""
    import fsspec

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    where = f"127.0.0.1:{port}"
    command = [os.environ["MOECC_FAKE_GCS"], "-scheme", "http", "-host", "127.0.0.1", "-backend",
               "memory", "-port", str(port), "-public-host", where]  # fmt: skip
    process = subprocess.Popen(
        [*command, "-external-url", f"http://{where}"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{where}")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(100):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    system = fsspec.filesystem("gs")
    system.mkdir("bucket")
    system.put(str(GOLDEN / "llama_gqa"), "bucket/tiny", recursive=True)
    yield system
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    process.kill()
    process.wait()


def moecc(*words):
    return main([str(word) for word in words])


def test_an_output_has_one_writer(store, tmp_path):
    assert moecc("convert", "gs://bucket/tiny", tmp_path / "moe", *CONVERT) == 0
    first = StoreOutput("gs://bucket/out")
    with first.claimed("first"), pytest.raises(InputError, match="another conversion is writing"):
        StoreOutput("gs://bucket/out").put(tmp_path / "moe")
    first.put(tmp_path / "moe")
    assert verify_manifest(mirror("gs://bucket/out")) == []
    assert moecc("push", tmp_path / "moe", "gs://bucket/out") == 1
    assert moecc("convert", "gs://bucket/tiny", "gs://bucket/out", *CONVERT, "--force") == 0
    assert moecc("verify", "gs://bucket/out") == 0


@pytest.mark.slow
def test_a_run_goes_on_from_the_store_alone(store, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    recipe = make_recipe(tmp_path, "steps = 4\nsave_steps = 2\nkeep = 9")
    assert moecc("train", recipe, "--out", tmp_path / "whole") == 0
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(half / "steps" / "4")
    store.put(str(half), "bucket/run", recursive=True)
    assert moecc("train", recipe, "--out", "gs://bucket/run") == 0
    store.invalidate_cache()
    store.get("bucket/run", str(tmp_path / "copy"), recursive=True)
    assert same_runs(tmp_path / "copy", tmp_path / "whole")
    assert moecc("verify", "gs://bucket/run@2") == 0
