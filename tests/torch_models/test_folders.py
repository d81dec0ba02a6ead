"""``moecc convert --via torch``: folders of transformers of any class, from the command line."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("jax", reason="jax is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from moecc import torch as mt  # noqa: E402
from moecc.cli.main import main  # noqa: E402

from .test_transformers import SIZES  # noqa: E402

PIPELINE = "upcycle{experts=4 top-k=2},add-losses"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return a folder of a family that moecc does not read."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.Starcoder2Config(**SIZES, num_key_value_heads=2)
    transformers.Starcoder2ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """Return what it is converted to."""
    out = tmp_path_factory.mktemp("results") / "sparse"
    words = ["convert", str(dense), str(out), "--via", "torch", "-p", PIPELINE]
    assert main([*words, "--dry-run"]) == 0
    assert not out.exists()
    assert main([*words, "--max-shard-bytes", "20000"]) == 0
    return out


def test_a_folder_is_what_the_functions_of_python_write(dense, sparse, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    ids = torch.randint(3, 64, (2, 9))
    moe = mt.convert(model, {"input_ids": ids}, PIPELINE)
    moe.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shards = sorted(sparse.glob("*.safetensors"))
    assert len(shards) > 1
    written = {name: x for shard in shards for name, x in load_file(shard).items()}
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    for name in ("graph.moe", "modeling_moecc.py"):
        assert (sparse / name).read_text() == (tmp_path / name).read_text()
    assert (sparse / "tokenizer.json").read_text() == "{}"
    assert json.loads((sparse / "config.json").read_text())["use_cache"]
    logits = model(ids).logits
    assert torch.allclose(mt.load(sparse)(ids).logits, logits, atol=1e-6)
    auto = transformers.AutoModelForCausalLM.from_pretrained(sparse, trust_remote_code=True)
    assert torch.allclose(auto(ids).logits, logits, atol=1e-6)


def test_the_commands_prove_and_verify_it(dense, sparse, tmp_path, capsys):
    receipt = json.loads((sparse / "moecc_receipt.json").read_text())
    assert receipt["proof"]["verdict"] == "proved"
    assert main(["verify", str(sparse)]) == 0
    said = capsys.readouterr().out
    assert "Runs in: PyTorch, by the program in the folder" in said
    assert "convert --verify" not in said, "which this conversion has not"
    log = tmp_path / "log.json"
    assert main(["prove", str(dense), str(sparse), "--proof", str(log)]) == 0
    assert "proved" in capsys.readouterr().out
    assert log.is_file()
    graph = sparse / "graph.moe"
    text = graph.read_text()
    graph.write_text(text.replace("gelu_tanh", "relu", 1))
    try:
        assert main(["prove", str(dense), str(sparse)]) == 3
    finally:
        graph.write_text(text)
    assert "the file differs" in capsys.readouterr().err


def test_what_no_receipt_is_a_proof_of_is_not_proved(dense, tmp_path, capsys):
    out = tmp_path / "unchecked"
    words = ["--via", "torch", "-p", PIPELINE, "--no-check"]
    assert main(["convert", str(dense), str(out), *words]) == 0
    assert main(["prove", str(dense), str(out)]) == 1
    assert "no proof of this conversion" in capsys.readouterr().err


def test_another_element_type_and_the_log_of_the_proof(dense, tmp_path, capsys):
    out, log = tmp_path / "out", tmp_path / "log.json"
    words = ["--via", "torch", "-p", PIPELINE, "--dtype", "bf16", "--proof", str(log)]
    assert main(["convert", str(dense), str(out), *words]) == 0
    assert log.is_file()
    stored, source = load_file(out / "model.safetensors"), load_file(dense / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.c_fc.weight"
    expert = stored["model.layers.0.mlp.experts.c_fc.weight"][3]
    assert torch.equal(expert, source[name].bfloat16())
    assert mt.load(out).dtype == torch.bfloat16
    assert main(["prove", str(dense), str(out)]) == 0


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


REMOTE = {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "modeling_own.OwnModel"}}


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (lambda f: change_config(f, architectures=None), [], "names no class of a model"),
        (lambda f: change_config(f, architectures=["NewLM"]), [], "has no class NewLM"),
        (lambda f: change_config(f, **REMOTE), [], "--trust-remote-code runs that code"),
        (lambda f: change_config(f, quantization_config={"bits": 4}), [], "quantised"),
        (lambda f: change_config(f, hidden_act="none"), [], "cannot build the model"),
        (without_weight, [], "lacks a weight"),
        (None, ["--to", "mixtral"], "the result is of the class of the source"),
        (None, ["--emit", "torch"], "has its mixtures as PyTorch already"),
        (None, ["--experts", "b=B"], "every expert is made of one model"),
        (None, ["--capture", "stats"], "statistics are of graphs of families"),
        (None, ["--padding-mask"], "has a mask of its own"),
        (None, ["--verify"], "moecc prove SOURCE OUT"),
        (None, ["--resume"], "give --force"),
        (None, ["--part", "1/2"], "one process writes all shards"),
        (None, ["--join"], "there are no parts"),
        (None, ["--dtype", "q8_0"], "elements of floating point"),
        (None, ["--inputs", "none.npz"], "no such file"),
        (None, ["-p", "upcycle{experts=0}"], "experts"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_leaves_nothing(
    dense, tmp_path, capsys,
    change, words, said,
):  # fmt: skip
    folder = tmp_path / "dense"
    folder.mkdir()
    for file in filter(Path.is_file, dense.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    if change is not None:
        change(folder)
    out = tmp_path / "out"
    pipeline = [] if "-p" in words else ["-p", PIPELINE]
    code = main(["convert", str(folder), str(out), "--via", "torch", *pipeline, *words])
    assert code in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]
