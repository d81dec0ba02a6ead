"""Receipts: a pass that lies writes nothing, and every output says what was measured."""

import re
from functools import partial

import pytest
from tiers import few

from moecc.formats import writer

from .conftest import GOLDEN, read_json

LIAR = '''
from dataclasses import dataclass
from typing import ClassVar
from moecc.ir import Builder
from moecc.rewrite.passes import EXACT, Pass, PassResult

@dataclass(frozen=True)
class LiarPass(Pass):
    """Promise to change nothing, and scale the logits."""
    name: ClassVar[str] = "liar"
    summary: ClassVar[str] = "lie"
    preserves = EXACT
    def apply(self, graph, ctx):
        logits = graph.outputs["logits"]
        graph.set_output("logits", Builder(graph).scale(logits, by=1.0001))
        return PassResult(changed=True)
'''


def read_receipt(folder):
    return read_json(folder / "moecc_receipt.json")


@pytest.fixture
def lie(cli, dense, tmp_path, out):
    """Convert with the pass that lies."""
    own = tmp_path / "liar.py"
    own.write_text(LIAR)
    how = {"pipeline": "liar", "to": "st_moe"}
    return partial(cli.convert, dense, out, "--load", own, **how)


def test_a_pass_that_lies_is_refused_and_writes_nothing(lie, out):
    for more in ((), ("--dry-run",)):
        lie(*more, code=3, says="pass 1, liar: the pass broke its promise")
        assert not out.exists()
    lie("--no-check")
    assert read_receipt(out)["unchecked"] == "--no-check"


def test_what_the_logits_show_is_refused_too(lie, out):
    says = ("the logits differ from those of the source", "in float64")
    lie("--no-check", "--verify", code=3, says=says)
    assert not out.exists()


def test_a_wrong_writer_is_found_at_the_logits(cli, dense, tmp_path, out, monkeypatch):
    right = writer._bytes_of
    monkeypatch.setattr(writer, "_bytes_of", lambda v: right(v.T if v.shape == (16, 16) else v))
    cli.convert(dense, out, "--verify", pipeline="", to="llama", code=3)
    assert list(tmp_path.iterdir()) == [dense]


def test_a_receipt_says_what_was_promised_and_measured(cli, dense, out):
    cli.convert(dense, out, "--verify")
    receipt = read_receipt(out)
    assert receipt["promised"]["kind"] == "reassociation"
    (checked,) = receipt["checked"]
    assert checked["pass"] == "upcycle{experts=4}"
    assert (checked["measured_error"], checked["proved"]) == (None, True)
    assert receipt["proof"]["verdict"] == "proved"
    assert receipt["proof"]["lemmas"]["shares add up"] >= 3
    assert receipt["verified"]["difference"]["max_relative"] < 1e-5
    assert receipt["verified"]["inputs"] == {"tokens": [2, 128]}
    assert {e["engine"] for e in receipt["engines"] if e["runs"]} >= {"transformers 5", "vLLM"}
    card = (out / "README.md").read_text()
    assert len(re.findall("^- (?:Promised|Proved|Measured|Runs in): ", card, re.MULTILINE)) == 4
    verified = cli("verify", out).out
    assert "Promised: reassociation" in verified
    assert "the result is the same function as the source" in verified
    assert "the logits in f32" in verified
    assert cli.json("verify", out)["receipt"] == receipt
    # A receipt is a file like any other.
    text = (out / "moecc_receipt.json").read_text()
    (out / "moecc_receipt.json").write_text(text.replace("reassociation", "exact"))
    cli("verify", out, code=3)


def test_what_is_not_proved_says_what_was_measured(cli, out):
    model, pipeline = GOLDEN / "apertus_biases", "upcycle{experts=4 granularity=2 pad=7}"
    done = cli.convert(model, out, pipeline=pipeline, to="st_moe")
    gap = "not proved: the graphs part at %up2 = contract @layers.0.ffn"
    assert f"  measured    1 pass, at small sizes only, {gap}" in done.out
    receipt = read_receipt(out)
    assert receipt["proof"]["verdict"] == "unknown"
    assert receipt["checked"][0]["gap"] in done.out
    says = (
        "%up2 = contract @layers.0.ffn",
        "no proof to write",
        "expected: Σ",
        "--verify compares",
    )
    proof = ("--proof", out.parent / "proof.json", "--force")
    cli.convert(model, out, *proof, pipeline=pipeline, to="st_moe", code=3, says=says)


@pytest.mark.parametrize(
    ("source", "to", "count", "way_out"),
    [
        ("bert_square", "bert", 2, "--to st_moe keeps them"),
        ("bert_square", "st_moe", 0, ""),  # which keeps the pooler
        ("siglip_vision", "auto", 11, "moecc convert --via torch keeps them"),
    ],
)
def test_a_proof_says_what_it_leaves_out(cli, out, source, to, count, way_out):
    passes = "upcycle{experts=2}" if to != "bert" else ""
    cli.convert(GOLDEN / source, out, pipeline=passes, to=to)
    same = "the same function as the source"
    if count:
        same += f" without {count} tensors that are not converted"
    assert len(read_receipt(out)["left_out"]) == count
    card = (out / "README.md").read_text()
    assert f"Proved: the result is {same}, for all inputs" in card
    assert way_out in card.replace("\\", "")
    assert f"  {same}: proved again\n" in cli("verify", out, "--against", GOLDEN / source).out
    proof = cli("prove", GOLDEN / source, out).out
    assert (f"{count} tensors of {GOLDEN / source} left out" in proof) == bool(count)


def test_an_error_that_was_announced_is_measured(cli, dense, out):
    pipeline = "upcycle{experts=4 top-k=2 gates=softmax}"
    cli.convert(dense, out, "--verify", pipeline=pipeline, to="st_moe")
    receipt = read_receipt(out)
    assert receipt["promised"]["kind"] == "approximate"
    assert receipt["checked"][0]["measured_error"] > 0
    assert receipt["proof"] is None
    assert receipt["verified"]["difference"]["max_relative"] > 1e-4
    assert receipt["verified"]["tolerance"] is None
    cli("verify", out, "--against", dense, code=3, says="its receipt announces it: softmax gates")


@pytest.mark.parametrize(
    ("target", "name", "dtype", "options"),
    few([
        ("mixtral", "out", "bf16", "experts=4"),
        ("gguf:llama", "out.gguf", "f16", "experts=6 top-k=3 granularity=3"),
    ]),
)  # fmt: skip
def test_weights_that_are_rounded_with_a_factor_are_the_same_function(
    cli, dense, tmp_path, target, name, dtype, options
):
    """3 W is rounded, and not W; a GGUF file has norms and routers in float32, too."""
    pipeline, more = f"upcycle{{{options}}}", ("--dtype", dtype, "--verify")
    cli.convert(dense, tmp_path / name, *more, pipeline=pipeline, to=target)


def test_heads_of_another_width_are_none_for_transformers_4(cli, out):
    plan = cli.dry_run(GOLDEN / "llama_llama3", out, to="granitemoe")
    runs = {engine["engine"]: engine["runs"] for engine in plan["engines"]}
    assert (runs["transformers 5"], runs["transformers 4"]) == (True, False)


@pytest.mark.parametrize(
    ("target", "case", "said"),
    [
        ("st_moe", "llama_gqa", "Runs in: moecc"),
        ("glm4_moe", "glm4_moe_plain_v4", "transformers computes no loss that balances"),
    ],
)
def test_a_card_claims_what_is_so(cli, out, target, case, said):
    cli.convert(GOLDEN / case, out, pipeline="", to=target)
    assert said in (out / "README.md").read_text()


def test_of_a_large_output_the_first_layers_are_compared(cli, dense, out, monkeypatch):
    monkeypatch.setattr("moecc.jobs.comparison.MAX_VERIFIED_PARAMETERS", 12_000)
    cli.convert(dense, out, "--verify")
    assert read_receipt(out)["verified"]["layers"] == 2
    assert "the logits of the first 2 layers" in cli("verify", out).out
