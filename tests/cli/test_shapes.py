"""The commands with encoder-decoders and encoders: several inputs, other outputs, other targets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent.parent / "golden"
SWITCH = "upcycle{experts=4 top-k=1 gates=switch router-init=zero}"
MIXTURE = "upcycle{experts=4 top-k=2}"


@pytest.fixture
def t5(tmp_path):
    """A copy of a tiny t5 of version 1.0."""
    return Path(shutil.copytree(GOLDEN / "t5_relu_tied", tmp_path / "t5"))


@pytest.mark.parametrize(
    ("target", "pipeline"),
    [
        ("switch_transformers", SWITCH),
        pytest.param("st_moe", MIXTURE, marks=pytest.mark.slow),
    ],
)
def test_a_t5_is_converted_and_stays_the_same_function(moecc, t5, tmp_path, target, pipeline):
    out = tmp_path / "sparse"
    assert moecc("convert", t5, out, "-p", pipeline, "--to", target).code == 0
    verdict = moecc("verify", out, "--against", t5, "--format", "json").json()
    assert verdict["passed"]
    assert verdict["output"] == "logits"
    assert verdict["inputs"] == {"tokens": [2, 128], "decoder_tokens": [2, 112]}
    assert moecc("inspect", out, "--format", "json").json()["family"] == target


def test_an_encoder_is_converted_to_st_moe(moecc, tmp_path):
    source, out = GOLDEN / "bert_gelu", tmp_path / "sparse"
    done = moecc("convert", source, out, "-p", MIXTURE, "--to", "st_moe")
    assert done.code == 0
    verdict = moecc("verify", out, "--against", source, "--format", "json").json()
    assert (verdict["output"], verdict["passed"]) == ("hidden", True)
    assert verdict["difference"]["kl_nats"] is None
    # Positions are learned, so a sequence is no longer than their table.
    assert verdict["inputs"] == {"tokens": [2, 24]}
    # The pooler is kept, so that the card names no tensor that was left out.
    assert "pooler.dense" not in (out / "README.md").read_text()


def test_a_padding_mask_is_an_input(moecc, tmp_path):
    graph, out = tmp_path / "model.moe", tmp_path / "out.npy"
    assert moecc("import", GOLDEN / "bert_gelu", "--padding-mask", "-o", graph).code == 0
    tokens = np.load(GOLDEN / "bert_gelu" / "tokens.npy")
    mask = np.ones(tokens.shape, bool)
    mask[1, 9:] = False
    found = []
    for changed in (tokens, np.where(mask, tokens, 5)):
        np.savez(tmp_path / "in.npz", tokens=changed, mask=mask)
        args = ("--inputs", tmp_path / "in.npz", "--outputs", out, "--force")
        assert moecc("run", graph, *args).code == 0
        found.append(np.load(out))
    np.testing.assert_allclose(found[0][mask], found[1][mask], rtol=1e-5, atol=1e-6)
    golden = np.load(GOLDEN / "bert_gelu" / "hidden.npy")
    assert np.abs(found[0][0] - golden[0]).max() < 1e-5 < np.abs(found[0][1] - golden[1]).max()


def test_a_padding_mask_survives_a_conversion(moecc, tmp_path):
    source, out = GOLDEN / "bert_gelu", tmp_path / "sparse"
    args = ("-p", "st-moe{experts=4 layers=every:2}", "--to", "st_moe", "--padding-mask")
    assert moecc("convert", source, out, *args).code == 0
    tokens = np.load(source / "tokens.npy")
    mask = np.ones(tokens.shape, bool)
    mask[1, 9:] = False
    np.savez(tmp_path / "in.npz", tokens=tokens, mask=mask)
    args = ("--against", source, "--inputs", tmp_path / "in.npz", "--format", "json")
    verdict = moecc("verify", out, *args).json()
    assert verdict["passed"]
    assert verdict["inputs"] == {"tokens": [*tokens.shape], "mask": [*mask.shape]}
    done = moecc("convert", GOLDEN / "llama_gqa", tmp_path / "no", "-p", MIXTURE, "--to", "mixtral",
                 "--padding-mask")  # fmt: skip
    assert (done.code, "padding after a text changes nothing" in done.err) == (1, True)


def test_wrong_inputs_are_told(moecc, t5, tmp_path):
    out = tmp_path / "out.npy"

    def refused(path):
        done = moecc("run", t5, "--inputs", path, "--outputs", out)
        assert done.code == 1
        return str(done.err)

    assert "also takes decoder_tokens" in refused(t5 / "tokens.npy")
    good = {n: np.load(t5 / f"{n}.npy") for n in ("tokens", "decoder_tokens")}
    path = tmp_path / "in.npz"
    np.savez(path, **good, token=good["tokens"])
    assert "did you mean 'tokens'" in refused(path)
    np.savez(path, **{**good, "decoder_tokens": good["decoder_tokens"] + 30})
    assert "outside the vocabulary" in refused(path)
    path.write_bytes(b"PK nothing")
    assert "not a .npz file" in refused(path)
    done = moecc("generate", t5, "--prompt", "x")
    assert done.code == 1
    assert "no tokenizer.json beside the weights" in done.err


def test_damage_to_a_stored_graph_is_told(moecc, t5, tmp_path):
    out = tmp_path / "sparse"
    assert moecc("convert", t5, out, "-p", MIXTURE, "--to", "st_moe").code == 0
    config = json.loads((out / "config.json").read_text())
    for change, words in (
        ({"graph": config["graph"][:-3]}, "graph"),
        ({"graph": [1, 2]}, "lines of a graph"),
        ({"moecc_layout": 9}, "another version"),
    ):
        (out / "config.json").write_text(json.dumps({**config, **change}))
        done = moecc("inspect", out)
        assert done.code == 1
        assert words in done.err
