"""Models of the hub, through a package in the place of huggingface_hub; folders without weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moecc.cli.main import main
from moecc.errors import InputError, MachineError, UsageError
from moecc.formats.open import FETCHED, is_model_id, open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "llama_gqa"


class Hub(ModuleType):
    """What moecc calls of huggingface_hub; it keeps what it is asked for."""

    def __init__(self, folder: Path | None, cached: bool = True) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.cached, self.asked = folder, cached, []  # type: ignore[var-annotated]

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        if self.folder is None or (options.get("local_files_only") and not self.cached):
            raise RuntimeError("no such model\nsecond line")
        return str(self.folder)


def put(monkeypatch: pytest.MonkeyPatch, hub: Hub | None) -> Hub | None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    return hub


def test_a_model_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(GOLDEN)
    put(monkeypatch, hub)
    with open_checkpoint("hf:some-org/a.model@v1") as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
    assert hub.asked == [
        ("some-org/a.model", {"revision": "v1", "allow_patterns": list(FETCHED)}),
    ]
    assert not any(Path(name).match(p) for p in FETCHED for name in ("pytorch_model.bin", "x.py"))


def test_a_plain_name_is_looked_up_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(GOLDEN)
    put(monkeypatch, hub)
    with open_checkpoint("some-org/model") as checkpoint:
        assert checkpoint.path == GOLDEN
    assert hub.asked == [("some-org/model", {"local_files_only": True})]
    put(monkeypatch, Hub(GOLDEN, cached=False))
    with pytest.raises(InputError, match="hf:some-org/model fetches the model"):
        open_checkpoint("some-org/model")


def test_what_cannot_be_fetched_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Hub(None))
    with pytest.raises(MachineError, match="RuntimeError: no such model\n"):
        open_checkpoint("hf:some-org/model")
    put(monkeypatch, None)
    with pytest.raises(MachineError, match="pip install huggingface_hub"):
        open_checkpoint("hf:some-org/model")
    with pytest.raises(UsageError, match="hf:ORG/NAME"):
        open_checkpoint("hf:model")
    assert not any(map(is_model_id, ("a/b/c", "../b", "a/", "/a", "-a/b", "a/b\n")))


def test_a_config_alone_is_enough_where_no_weight_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "llama" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--machine", "cpu:2"]) == 0
    for command in (["import"], ["run", "--inputs", "x.npy", "--outputs", "y.npy"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
        assert "no weights" in capsys.readouterr().err
    # A folder whose weights are incomplete is no config.
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert main(["inspect", str(tmp_path)]) == 1
