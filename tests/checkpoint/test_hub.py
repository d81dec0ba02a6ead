"""Models in the cache of the hub, through a package in the place of huggingface_hub; configs."""

import shutil
import sys
from types import ModuleType

import pytest

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.formats.open import is_model_id, open_checkpoint
from moecc.jobs.conversion_file import read_conversion_file

from .folders import GOLDEN, ONE

SOURCE = GOLDEN / "llama_gqa"


class Hub(ModuleType):
    """What moecc calls of huggingface_hub; it keeps what it is asked for."""

    def __init__(self, folder, cached=True):
        super().__init__("huggingface_hub")
        self.folder, self.cached, self.asked = folder, cached, []

    def snapshot_download(self, name, **options):
        self.asked.append((name, options))
        if self.folder is None or (options.get("local_files_only") and not self.cached):
            raise RuntimeError("no such model\nsecond line")
        return str(self.folder)


def put(monkeypatch, hub):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_a_plain_name_is_looked_up_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub = Hub(SOURCE)
    put(monkeypatch, hub)
    with open_checkpoint("some-org/model") as checkpoint:
        assert checkpoint.path == SOURCE
    assert hub.asked == [("some-org/model", {"local_files_only": True})]
    for absent in (Hub(SOURCE, cached=False), None):
        put(monkeypatch, absent)
        with pytest.raises(InputError, match="hf://some-org/model is the model of that name"):
            open_checkpoint("some-org/model")
    with pytest.raises(InputError, match=r"hf://ORG/SmolLM2-135M, .* preset:smollm2-135m"):
        open_checkpoint("SmolLM2-135M")
    with pytest.raises(InputError, match=r"hf://ORG/Some2\.5-7B$"):
        open_checkpoint("Some2.5-7B")
    assert not any(map(is_model_id, ("a/b/c", "../b", "a/", "/a", "-a/b", "a/b\n")))


@pytest.mark.parametrize(("cached", "place"), [(True, "a/b"), (False, "hf://a/b")])
def test_models_of_a_merge_are_looked_up_in_the_cache(monkeypatch, tmp_path, cached, place):
    monkeypatch.chdir(tmp_path)
    put(monkeypatch, Hub(SOURCE, cached=cached))
    text = "gate_mode: random\nexperts_per_token: 1\nexperts:\n- source_model: a/b\n"
    (tmp_path / "merge.yaml").write_text(f"base_model: a/b\n{text}")
    assert read_conversion_file("merge.yaml").source == place


def test_a_config_alone_is_enough_where_no_weight_is_read(tmp_path, capsys):
    shutil.copy(SOURCE / "config.json", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "llama" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--machine", "cpu:2"]) == 0
    for command in (["import"], ["run", "--inputs", "x.npy", "--outputs", "y.npy"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
        assert "no weights" in capsys.readouterr().err
    # A folder whose weights are incomplete is no config.
    (tmp_path / ONE).touch()
    assert main(["inspect", str(tmp_path)]) == 1
