"""``examples/my_family.py`` and what ``docs/adding-a-family.md`` says of families from outside."""

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moecc.cli.main import main
from moecc.errors import UsageError
from moecc.families import registry
from moecc.families.llama import LlamaConfig
from moecc.families.registry import Family, add_families
from moecc.formats.open import open_checkpoint
from moecc.ir import parse as parse_graph
from moecc.weights.expr import sources
from tests.train.tiny import make_recipe

ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "examples" / "my_family.py")
BIOGPT = Path(__file__).parent / "biogpt"


@pytest.fixture(autouse=True)
def families():
    """Take out what a test adds."""
    tables = (registry.CONFIGS.data, registry.ORIGINS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def logits(model, tmp_path, *options):
    """Return what the command `run` gives for the tokens of BioGPT, in float64."""
    out = tmp_path / "made.npy"
    words = ["--inputs", str(BIOGPT / "tokens.npy"), "--outputs", str(out), "--force", *options]
    assert main(["run", model, "--backend", "reference", *words]) == 0
    return np.load(out)


def test_the_logits_are_those_of_transformers(tmp_path):
    made = logits(str(BIOGPT), tmp_path, "--load", FILE)
    np.testing.assert_allclose(made, np.load(BIOGPT / "logits.npy"), atol=2e-7)


@pytest.mark.slow
def test_it_is_upcycled_and_trained_on(tmp_path, capsys):
    """A pass of one's own, too; and a run that was stopped goes on."""
    model = shutil.copytree(BIOGPT, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "vocab_size": 384, "max_position_embeddings": 64})
    )
    (tmp_path / "made").mkdir()
    recipe = make_recipe(tmp_path / "made", "steps = 3")
    sets = (
        f"model.source={model}", "model.pipeline=upcycle{experts=2 top-k=2},my-pass",
        "run.save_steps=1",
    )  # fmt: skip
    words = [word for one in sets for word in ("--set", one)]
    run = ["train", str(recipe), "--out", str(tmp_path / "run"), *words]
    assert main(run) != 0
    assert "unknown pass 'my-pass'" in capsys.readouterr().err
    load = ["--load", FILE, "--load", str(ROOT / "examples" / "my_pass.py")]
    assert main([*run, *load]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), *load]) == 0
    out = str(tmp_path / "sparse")
    assert main(["convert", str(tmp_path / "run"), out, "--to", "st_moe", *load]) == 0


def test_it_is_written_as_itself_and_upcycled(tmp_path, capsys):
    load, same, sparse = ("--load", FILE), tmp_path / "same", str(tmp_path / "sparse")
    assert main(["convert", str(BIOGPT), str(same), "-p", "", "--to", "biogpt", *load]) == 0
    written, stored = (load_file(f / "model.safetensors") for f in (same, BIOGPT))
    assert written.keys() == stored.keys()
    assert all(np.array_equal(written[name], stored[name]) for name in stored)
    upcycle = ("-p", "upcycle{experts=2 top-k=2}", "--to", "st_moe")
    assert main(["convert", str(BIOGPT), sparse, *upcycle, *load]) == 0
    made = logits(sparse, tmp_path, "--load", FILE)
    np.testing.assert_allclose(made, np.load(BIOGPT / "logits.npy"), atol=2e-6)
    capsys.readouterr()
    assert main(["plan", str(BIOGPT), "--machine", "cpu:2", *load]) == 0
    assert "on cpu:2" in capsys.readouterr().out


TINY = """\
moecc 1
graph tiny {
  attr checkpoint = "tiny"
  input %tokens : i32[batch=B, seq=S]
  param %wte : f32[vocab=40, embed=8] = source("wte" : f32[vocab=40, embed=8])
  param %ln : f32[embed=8] = source("blocks.0.ln" : f32[embed=8])
  param %fc : f32[mlp=16, embed=8] = source("blocks.0.fc" : f32[mlp=16, embed=8])
  param %proj : f32[embed=8, mlp=16] = source("blocks.0.proj" : f32[embed=8, mlp=16])
  param %out : f32[vocab=40, embed=8] = source("out" : f32[vocab=40, embed=8])
  %h = embedding %wte, %tokens {axis=vocab} : f32[batch=B, seq=S, embed=8] @embed
  %n = rms_norm %h, %ln {axis=embed, eps=1e-05} : f32[batch=B, seq=S, embed=8] @layers.0.ffn
  %a = contract %n, %fc {over=embed} : f32[batch=B, seq=S, mlp=16] @layers.0.ffn
  %b = gelu %a : f32[batch=B, seq=S, mlp=16] @layers.0.ffn
  %c = contract %b, %proj {over=mlp} : f32[batch=B, seq=S, embed=8] @layers.0.ffn
  %r = add %h, %c : f32[batch=B, seq=S, embed=8] @layers.0.ffn
  %l = contract %r, %out {over=embed} : f32[batch=B, seq=S, vocab=40] @head
  output logits = %l
}
"""


def test_a_graph_without_a_family(tmp_path, capsys):
    file, draw = tmp_path / "tiny.moe", np.random.default_rng(0)
    file.write_text(TINY)
    (tmp_path / "tiny").mkdir()
    graph = parse_graph(TINY)
    tensors = {
        source.name: draw.standard_normal(source.type.shape).astype(np.float32)
        for param in graph.params.values() if param.weight for source in sources(param.weight)
    }  # fmt: skip
    save_file(tensors, tmp_path / "tiny" / "model.safetensors")
    out = str(tmp_path / "sparse")
    upcycle = ("-p", "upcycle{experts=4 top-k=2}", "--to", "st_moe")
    assert main(["convert", str(file), out, *upcycle]) == 0
    found = logits(out, tmp_path)
    np.testing.assert_allclose(found, logits(str(file), tmp_path), atol=1e-6 * abs(found).max())
    # The folder by itself says no architecture.
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "tiny")]) == 1
    assert "no config.json" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "tiny", needs_config=False).config == {}


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("X = 1", 2, "defines no pass, family or operation"),
        (
            "from moecc.families.registry import Family\n"
            "from moecc.families.llama import LlamaConfig\n"
            "class C(LlamaConfig):\n  model_type = 'mistral'\nF = Family(C)",
            2,
            "not a dataclass",
        ),
        (
            "from moecc.families.registry import Family\n"
            "from moecc.families.config import ModelConfig\n"
            "from dataclasses import dataclass\n"
            "@dataclass(frozen=True)\nclass C(ModelConfig):\n  model_type = 'mistral'\n"
            "  architecture = 'M'\n  defaults = {}\nF = Family(C)",
            2,
            "'mistral' is defined twice; another is in moecc",
        ),
        (
            "from moecc.families.registry import Family\n"
            "from moecc.families.llama import LlamaConfig\n"
            "def build(config, request):\n  return config.nothing\n"
            "from dataclasses import dataclass\n"
            "@dataclass(frozen=True, kw_only=True)\nclass C(LlamaConfig):\n"
            "  model_type = 'biogpt'\n  architecture = 'BioGptForCausalLM'\nF = Family(C, build)",
            1,
            "own.py:4: AttributeError",
        ),
    ],
)
def test_faults_of_a_file_are_its_authors(text, code, words, tmp_path, capsys):
    file, model = tmp_path / "own.py", shutil.copytree(BIOGPT, tmp_path / "model")
    file.write_text(text)
    config = json.loads((model / "config.json").read_text())
    del config["layer_norm_eps"]  # which a llama does not have
    (model / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(model), "--load", str(file)]) == code
    assert words in capsys.readouterr().err


def test_a_package_adds_its_families(monkeypatch):
    add_families(FILE)
    assert registry.CONFIGS.pop("biogpt").model_type == "biogpt"
    point = EntryPoint("llama", f"{__name__}:AGAIN", registry.ENTRY_POINT)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Family(registry.CONFIGS["mistral"]))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry.load_installed.cache_clear()
    registry.load_installed()
    assert registry.ORIGINS["mistral"] == point.value
    monkeypatch.setattr(EntryPoint, "load", lambda self: 1)
    registry.load_installed.cache_clear()
    with pytest.raises(UsageError, match="a family that cannot be loaded"):
        registry.load_installed()
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    registry.load_installed.cache_clear()
    assert issubclass(registry.CONFIGS["llama"], LlamaConfig)
