"""Receipts: a pass that lies writes nothing, and every output says what was measured."""

import json

import pytest

from moecc.formats import writer

from .conftest import GOLDEN

UPCYCLE = ("-p", "upcycle{experts=4 top-k=2}", "--to", "mixtral")

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


def receipt(folder):
    return json.loads((folder / "moecc_receipt.json").read_text())


def test_a_pass_that_lies_is_refused_and_writes_nothing(moecc, dense, tmp_path):
    own = tmp_path / "liar.py"
    own.write_text(LIAR)
    command = ("convert", dense, tmp_path / "out", "-p", "liar", "--to", "st_moe", "--load", own)
    for extra in ((), ("--dry-run",)):
        done = moecc(*command, *extra)
        assert done.code == 3
        assert "pass 1, liar: the pass broke its promise" in done.err
        assert not (tmp_path / "out").exists()
    done = moecc(*command, "--no-check")
    assert done.code == 0, done.err
    assert receipt(tmp_path / "out")["unchecked"] == "--no-check"


def test_what_the_logits_show_is_refused_too(moecc, dense, tmp_path):
    own = tmp_path / "liar.py"
    own.write_text(LIAR)
    done = moecc("convert", dense, tmp_path / "out", "-p", "liar", "--to", "st_moe", "--load", own,
                 "--no-check", "--verify")  # fmt: skip
    assert done.code == 3
    assert "the logits differ from those of the source" in done.err
    assert "in float64" in done.err
    assert not (tmp_path / "out").exists()


def test_a_wrong_writer_is_found_at_the_logits(moecc, dense, tmp_path, monkeypatch):
    right = writer._bytes_of
    monkeypatch.setattr(writer, "_bytes_of", lambda v: right(v.T if v.shape == (16, 16) else v))
    done = moecc("convert", dense, tmp_path / "out", "-p", "", "--to", "llama", "--verify")
    assert done.code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_a_receipt_says_what_was_promised_and_measured(moecc, dense, tmp_path):
    out = tmp_path / "out"
    done = moecc("convert", dense, out, *UPCYCLE, "--verify")
    assert done.code == 0, done.err
    found = receipt(out)
    assert found["promised"]["kind"] == "reassociation"
    (checked,) = found["checked"]
    assert (checked["pass"], checked["measured_error"]) == ("upcycle{experts=4}", None)
    assert checked["proved"] is True
    assert found["proof"]["verdict"] == "proved"
    assert found["proof"]["lemmas"]["shares add up"] >= 3
    assert found["verified"]["difference"]["max_relative"] < 1e-5
    assert found["verified"]["inputs"] == {"tokens": [2, 128]}
    assert {e["engine"] for e in found["engines"] if e["runs"]} >= {"transformers 5", "vLLM"}
    lines = [
        line.removeprefix("- ")
        for line in (out / "README.md").read_text().splitlines()
        if line.startswith(("- Promised: ", "- Proved: ", "- Measured: ", "- Runs in: "))
    ]
    assert len(lines) == 4
    verified = moecc("verify", out)
    assert verified.code == 0
    assert "Promised: reassociation" in verified.out
    assert "the result is the same function as the source" in verified.out
    assert "the logits in f32" in verified.out
    assert moecc("verify", out, "--format", "json").json()["receipt"] == found
    # A receipt is a file like any other.
    text = (out / "moecc_receipt.json").read_text()
    (out / "moecc_receipt.json").write_text(text.replace("reassociation", "exact"))
    assert moecc("verify", out).code == 3


def test_an_error_that_was_announced_is_measured(moecc, dense, tmp_path):
    out = tmp_path / "out"
    pipeline = "upcycle{experts=4 top-k=2 gates=softmax}"
    done = moecc("convert", dense, out, "-p", pipeline, "--to", "st_moe", "--verify")
    assert done.code == 0, done.err
    found = receipt(out)
    assert found["promised"]["kind"] == "approximate"
    assert found["checked"][0]["measured_error"] > 0
    assert found["proof"] is None
    assert found["verified"]["difference"]["max_relative"] > 1e-4
    assert found["verified"]["tolerance"] is None


@pytest.mark.parametrize(
    ("target", "dtype", "options"),
    [
        ("mixtral", "bf16", "experts=4"),
        pytest.param(
            "gguf:llama", "f16", "experts=6 top-k=3 granularity=3", marks=pytest.mark.slow
        ),
    ],
)
def test_weights_that_are_rounded_with_a_factor_are_the_same_function(
    moecc, dense, tmp_path, target, dtype, options
):
    """3 W is rounded, and not W; a GGUF file has norms and routers in float32, too."""
    out = tmp_path / ("out.gguf" if target.startswith("gguf") else "out")
    how = ("-p", f"upcycle{{{options}}}", "--to", target, "--dtype", dtype, "--verify")
    done = moecc("convert", dense, out, *how)
    assert done.code == 0, done.err


def test_heads_of_another_width_are_none_for_transformers_4(moecc, tmp_path):
    how = ("-p", "upcycle{experts=4}", "--to", "granitemoe", "--dry-run", "--format", "json")
    data = moecc("convert", GOLDEN / "llama_llama3", tmp_path / "out", *how).json()
    runs = {engine["engine"]: engine["runs"] for engine in data["engines"]}
    assert (runs["transformers 5"], runs["transformers 4"]) == (True, False)


@pytest.mark.parametrize(
    ("target", "case", "said"),
    [
        ("st_moe", "llama_gqa", "Runs in: moecc"),
        ("glm4_moe", "glm4_moe_plain_v4", "transformers computes no loss that balances"),
    ],
)
def test_a_card_claims_what_is_so(moecc, tmp_path, target, case, said):
    done = moecc("convert", GOLDEN / case, tmp_path / "out", "-p", "", "--to", target)
    assert done.code == 0, done.err
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_of_a_large_output_the_first_layers_are_compared(moecc, dense, tmp_path, monkeypatch):
    monkeypatch.setattr("moecc.jobs.comparison.MAX_VERIFIED_PARAMETERS", 12_000)
    out = tmp_path / "out"
    assert moecc("convert", dense, out, *UPCYCLE, "--verify").code == 0
    assert receipt(out)["verified"]["layers"] == 2
    assert "the logits of the first 2 layers" in moecc("verify", out).out
