"""Fixtures of stores: a server of S3 and one with the hub's routes, both on this machine."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from hub_server import HubServer

from moecc.cli.main import main

pytest.importorskip("s3fs")
pytest.importorskip("huggingface_hub")
moto_server = pytest.importorskip("moto.server")

GOLDEN = Path(__file__).parents[1] / "golden"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA-secret-of-a-test",
    "AWS_SECRET_ACCESS_KEY": "secret-key-of-a-test",
    "HF_TOKEN": "hf_secret_of_a_test",
}
UPCYCLE = ("-p", "upcycle{experts=4 top-k=2}", "--to", "mixtral")


@pytest.fixture(scope="module")
def store():
    """fsspec's access to an S3 server with a model at ``bucket/tiny``."""
    import fsspec

    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        # The state of the server outlives it in this process, and so do connections to another.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        if not system.exists("bucket"):
            system.mkdir("bucket")
        system.put(str(GOLDEN / "llama_gqa"), "bucket/tiny", recursive=True)
        yield system
    server.stop()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with ``org/tiny``, whose branch v2 has another model."""
    import fsspec
    from huggingface_hub import constants

    model = tmp_path / "hub" / "org" / "tiny"
    shutil.copytree(GOLDEN / "llama_gqa", model / "main")
    shutil.copytree(GOLDEN / "gemma2_caps", model / "v2")
    server = HubServer(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    yield server
    server.shutdown()
    server.server_close()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return exit code and all output of a command, which must hold no secret."""
    code = main([str(word) for word in words])
    text = "".join(capsys.readouterr())
    assert not any(secret in text for secret in SECRETS.values())
    return code, text
