"""What a command needs beyond the core is named before it begins, all of it at once."""

import importlib.util
from pathlib import Path

import pytest

from moecc.cli.main import main
from moecc.support import extras

MODEL = str(Path(__file__).parents[1] / "golden" / "llama_gqa")


@pytest.fixture
def bare(monkeypatch):
    """Hide what extras bring."""
    hidden = {name.split(".")[0] for names in extras._MODULES.values() for name in names}
    monkeypatch.setattr(
        extras, "find_spec",
        lambda name: None if name in hidden else importlib.util.find_spec(name),
    )  # fmt: skip


ROWS = {
    "generate MODEL --prompt x": ("jax, tokenizers", "'tokenizers>="),
    "train recipe:upcycle --out OUT": ("jax, optax, orbax, tensorstore", "'orbax-checkpoint<"),
    "plan MODEL --machine cpu:8 --sequence 64 --html OUT": ("plotly", "'plotly>="),
    "compile MODEL --machine v5e-16": ("jax", "'jax[tpu]"),
    "compile MODEL --machine h100 --save OUT": ("jax, flatbuffers", "'jax[cuda12-local]"),
}


@pytest.mark.parametrize("line", ROWS)
@pytest.mark.usefixtures("bare")
def test_all_that_is_missing_is_named(line, tmp_path, capsys):
    command = line.replace("MODEL", MODEL).replace("OUT", str(tmp_path / "out")).split()
    assert main(command) == 4
    said = capsys.readouterr().err
    missing, package = ROWS[line]
    assert f" needs {missing}\n  hint: pip install '" in said
    assert package in said
    assert list(tmp_path.iterdir()) == []
