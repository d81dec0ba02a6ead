"""The commands with encoder-decoders and encoders: several inputs, other outputs, other targets."""

import json

import numpy as np
import pytest
from tiers import few

from .conftest import GOLDEN, LLAMA, UPCYCLE, read_json

T5, BERT = GOLDEN / "t5_relu_tied", GOLDEN / "bert_gelu"
SWITCH = "upcycle{experts=4 top-k=1 gates=switch router-init=zero}"
TOKENS = np.load(BERT / "tokens.npy")
MASK = np.ones(TOKENS.shape, bool)
MASK[1, 9:] = False


@pytest.mark.parametrize(
    ("target", "pipeline"), few([("switch_transformers", SWITCH), ("st_moe", UPCYCLE)])
)
def test_a_t5_is_converted_and_stays_the_same_function(cli, out, target, pipeline):
    cli.convert(T5, out, pipeline=pipeline, to=target)
    verdict = cli.json("verify", out, "--against", T5)
    assert verdict["passed"]
    assert verdict["output"] == "logits"
    assert verdict["inputs"] == {"tokens": [2, 128], "decoder_tokens": [2, 112]}
    assert cli.json("inspect", out)["family"] == target


def test_an_encoder_is_converted_to_st_moe(cli, out):
    cli.convert(BERT, out, to="st_moe")
    verdict = cli.json("verify", out, "--against", BERT)
    assert (verdict["output"], verdict["passed"]) == ("hidden", True)
    assert verdict["difference"]["kl_nats"] is None
    # Positions are learned, so a sequence is no longer than their table.
    assert verdict["inputs"] == {"tokens": [2, 24]}
    # The pooler is kept, so that the card names no tensor that was left out.
    assert "pooler.dense" not in (out / "README.md").read_text()


def test_a_padding_mask_is_an_input(cli, tmp_path):
    graph, inputs, out = (tmp_path / name for name in ("model.moe", "in.npz", "out.npy"))
    cli("import", BERT, "--padding-mask", "-o", graph)
    outputs = []
    for tokens in (TOKENS, np.where(MASK, TOKENS, 5)):
        np.savez(inputs, tokens=tokens, mask=MASK)
        cli("run", graph, "--inputs", inputs, "--outputs", out, "--force")
        outputs.append(np.load(out))
    hidden, changed = outputs
    np.testing.assert_allclose(hidden[MASK], changed[MASK], rtol=1e-5, atol=1e-6)
    golden = np.load(BERT / "hidden.npy")
    assert np.abs(hidden[0] - golden[0]).max() < 1e-5 < np.abs(hidden[1] - golden[1]).max()


def test_a_padding_mask_survives_a_conversion(cli, tmp_path, out):
    inputs = tmp_path / "in.npz"
    pipeline = "st-moe{experts=4 layers=every:2}"
    cli.convert(BERT, out, "--padding-mask", pipeline=pipeline, to="st_moe")
    np.savez(inputs, tokens=TOKENS, mask=MASK)
    verdict = cli.json("verify", out, "--against", BERT, "--inputs", inputs)
    assert verdict["passed"]
    assert verdict["inputs"] == {"tokens": [*TOKENS.shape], "mask": [*MASK.shape]}


def test_a_decoder_takes_no_padding_mask(cli, out):
    says = "padding after a text changes nothing"
    cli.convert(LLAMA, out, "--padding-mask", code=1, says=says)


def test_wrong_inputs_are_told(cli, tmp_path):
    path = tmp_path / "in.npz"

    def refused(says, path=path):
        cli("run", T5, "--inputs", path, "--outputs", tmp_path / "out.npy", code=1, says=says)

    refused("also takes decoder_tokens", T5 / "tokens.npy")
    good = {name: np.load(T5 / f"{name}.npy") for name in ("tokens", "decoder_tokens")}
    np.savez(path, **good, token=good["tokens"])
    refused("did you mean 'tokens'")
    np.savez(path, **{**good, "decoder_tokens": good["decoder_tokens"] + 30})
    refused("outside the vocabulary")
    path.write_bytes(b"PK nothing")
    refused("not a .npz file")
    cli("generate", T5, "--prompt", "x", code=1, says="no tokenizer.json beside the weights")


def test_damage_to_a_stored_graph_is_told(cli, out):
    cli.convert(T5, out, to="st_moe")
    config = read_json(out / "config.json")
    for change, words in (
        ({"graph": config["graph"][:-3]}, "graph"),
        ({"graph": [1, 2]}, "lines of a graph"),
        ({"moecc_layout": 9}, "another version"),
    ):
        (out / "config.json").write_text(json.dumps({**config, **change}))
        cli("inspect", out, code=1, says=words)
