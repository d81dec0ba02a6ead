"""The demo of training, with few steps: every command of it works on what the last one wrote."""

import json

import pytest

from .loading import load

pytest.importorskip("orbax.checkpoint")

example = load("train_on_docs")


@pytest.mark.slow
def test_the_chain_with_few_steps(tmp_path, capsys):
    assert example.main(["--out", str(tmp_path / "out"), "--smoke"]) == 0, capsys.readouterr()
    out = tmp_path / "out"
    manifest = json.loads((out / "mixtral" / "moecc_manifest.json").read_text())
    assert [stage["kind"] for stage in manifest["lineage"]] == ["train", "train"]
    assert (out / "mixtral" / "tokenizer.json").is_file()
    shown = capsys.readouterr().out
    assert "the token alone explains" in shown
    assert f"against {out / 'dense'}" in shown.replace("\n", "")
