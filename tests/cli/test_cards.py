"""Model cards: where a model comes from, its licences, and what it is for."""

import re
import shutil
import sys
from hashlib import sha256

import moecc_check
import numpy as np
import pytest

from moecc.formats.manifest import load
from tests.train.tiny import draw_weights, make_model

from .conftest import GOLDEN, LLAMA, edit_json, edited_tensors, read_json

TERMS = "---\nlicense: {}\nextra_gated_prompt: |\n  Do no harm.\n\n  Agreed?\n---\n"


def card_of(folder):
    return (folder / "README.md").read_text()


def front(folder):
    """Return the metadata of a card as YAML reads them."""
    import yaml

    return yaml.safe_load(card_of(folder).split("---\n")[1])


def in_cache(top, name):
    """Return a copy of the tiny llama where the cache of the Hub has a model."""
    folder = top / f"models--{name.replace('/', '--')}" / "snapshots" / "a1b2c3"
    return shutil.copytree(LLAMA, folder)


def test_a_second_conversion_keeps_the_history(cli, tmp_path):
    source, first, second = in_cache(tmp_path, "org/tiny"), tmp_path / "a", tmp_path / "b"
    (source / "README.md").write_text(TERMS.format("other\nlicense_name: mine"))
    cli.convert(source, first)
    assert front(first)["base_model"] == ["org/tiny"]
    assert "# tiny-mixtral\n" in card_of(first)
    cli.convert(first, second, pipeline="", to="st_moe")
    cli.convert(second, tmp_path / "c", pipeline="", to="gguf:llama")
    cli.convert(tmp_path / "c", tmp_path / "d", pipeline="", to="auto")
    expected = {
        "license": "other", "license_name": "mine", "base_model": ["org/tiny"],
        "extra_gated_prompt": "Do no harm.\n\nAgreed?\n",
    }  # fmt: skip
    assert front(second).items() >= expected.items()
    assert "1. tiny was converted through upcycle{experts=4" in card_of(second)
    del expected["extra_gated_prompt"]  # a GGUF file has no place for it
    assert front(tmp_path / "d").items() >= expected.items()
    assert [stage["source"] for stage in load(tmp_path / "d").lineage] == ["tiny", "a", "b"]
    assert "converted, not trained further" in card_of(tmp_path / "d")


def test_of_several_models_all_are_named_with_their_licences(cli, tmp_path, out):
    models = [in_cache(tmp_path, f"org/{name}") for name in "abc"]
    for model, licence in zip(models[:2], ("mit", "[apache-2.0, mit]"), strict=True):
        (model / "README.md").write_text(TERMS.format(licence))
    more = [word for name, model in zip("bc", models[1:], strict=True)
            for word in ("--experts", f"{name}={model}")]  # fmt: skip
    cli.convert(models[0], out, *more, pipeline="upcycle{experts=3 sources=base,b,c}")
    assert front(out)["base_model"] == ["org/a", "org/b", "org/c"]
    assert front(out)["license"] == ["mit", "apache-2.0"]
    assert "of c no licence is known" in card_of(out)
    assert "made from `org/a`, `org/b` and `org/c`" in card_of(out)


def test_a_local_source_is_named_by_the_command(cli, dense, out):
    cli.convert(dense, out, "--base-model", "tiny", code=2, says="expected: ORG/NAME")
    cli.convert(dense, out)
    assert "base_model" not in front(out)
    assert "made from `dense` (`llama`)" in card_of(out)
    cli.convert(dense, out, "--base-model", "org/tiny", "--force")
    assert front(out)["base_model"] == ["org/tiny"]
    assert "--seed 0 --base-model org/tiny\n" in card_of(out)


def test_tensors_that_a_pass_leaves_out_are_not_those_of_no_graph(cli, out):
    cli.convert(GOLDEN / "mixtral_gqa", out, pipeline="prune{keep=2}")
    assert "not converted" not in card_of(out)


@pytest.fixture
def classifier(tmp_path):
    """A tiny BERT with a head for three labels."""
    folder = shutil.copytree(GOLDEN / "bert_square", tmp_path / "classifier")
    labels = {"id2label": {"0": "bad", "1": "so-so", "2": "good"}}
    edit_json(folder / "config.json", architectures=["BertForSequenceClassification"], **labels)
    with edited_tensors(folder) as tensors:
        of_base = {f"bert.{name}": tensors.pop(name) for name in list(tensors)}
        width = len(of_base["bert.embeddings.LayerNorm.weight"])
        head = np.arange(3 * width, dtype=np.float32).reshape(3, width)
        tensors |= of_base | {"classifier.weight": head, "classifier.bias": head[:, 0]}
    return folder


@pytest.mark.parametrize("pipeline", ["", "upcycle{experts=4 top-k=2}"])
def test_auto_keeps_the_head_of_a_classifier(cli, classifier, out, pipeline):
    cli.convert(classifier, out, pipeline=pipeline, to="auto")
    assert "classifier.weight" in load(out).tensors
    assert read_json(out / "config.json")["id2label"]["2"] == "good"
    assert front(out)["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize(
    ("case", "to", "task", "loader"),
    [
        ("bert_square", "bert", "feature-extraction", "AutoModel"),
        ("vit_square", "auto", "image-feature-extraction", "AutoModel"),
        ("whisper_square", "auto", "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
        ("bart_square", "auto", "text2text-generation", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_card_says_what_a_model_is_for(cli, out, case, to, task, loader):
    cli.convert(GOLDEN / case, out, pipeline="", to=to)
    assert front(out)["pipeline_tag"] == task
    assert f"= {loader}.from_pretrained" in card_of(out)


def test_an_embedder_stays_one(cli, tmp_path, out):
    source = shutil.copytree(GOLDEN / "bert_square", tmp_path / "bert")
    (source / "README.md").write_text("---\npipeline_tag: sentence-similarity\n---\n")
    cli.convert(source, out, "--emit", "torch", to="st_moe")
    assert front(out)["pipeline_tag"] == "sentence-similarity"
    # Its program has classes with new heads, too, which are not what was converted.
    assert "= AutoModel.from_pretrained" in card_of(out)


@pytest.mark.parametrize(
    ("to", "dtype", "types", "rounded"),
    [
        ("llama", None, "f32", None),
        ("llama", "bf16", "bf16", "bf16"),
        ("gguf:llama", "f16", "f16 and f32", "f16"),
        ("gguf:llama", "q8_0", "q8_0 and f32", "q8_0"),
    ],
)
def test_what_is_rounded_is_not_called_exact(cli, tmp_path, out, to, dtype, types, rounded):
    source = make_model(tmp_path / "dense", hidden_size=32, head_dim=8, intermediate_size=64)
    more = [] if dtype is None else ["--dtype", dtype]
    cli.convert(draw_weights(source), out, *more, pipeline="", to=to)
    card = card_of(out).replace("\\", "")
    assert f"- Element type: {types}\n" in card
    expected = "" if rounded is None else f", but for weights that are rounded to {rounded}"
    assert f"- Promised: exact{expected}\n" in card
    if dtype != "q8_0":
        assert f"weights and lengths{expected}\n" in card
    # Of these files of no tokenizer none is run with a text.
    assert '-p "' not in card


def test_a_proof_is_published_with_its_result(cli, dense, out):
    def publish(name, code=0, says=()):
        return cli.convert(dense, out, "--proof", out / name, code=code, says=says)

    publish("config.json", code=2, says="OUT/proof.json")
    assert not out.exists()
    publish("proof.json")
    cli("verify", out)
    stated = read_json(out / "moecc_receipt.json")["proof"]
    texts = [out / f"proof.{side}.moe" for side in ("before", "after")]
    digests = [sha256(text.read_bytes()).hexdigest() for text in texts]
    assert digests == [stated["source"], stated["result"]]
    log = read_json(out / "proof.json")
    assert digests == [log["before"], log["after"]]
    moecc_check.accepted(log, *(text.read_text() for text in texts))
    assert str(dense) not in texts[0].read_text()
    assert "`moecc-check proof.json proof.before.moe proof.after.moe` checks" in card_of(out)
    assert "--proof OUT/proof.json\n" in card_of(out)


@pytest.mark.parametrize("case", ["llama_gqa", "t5_square"])
def test_the_code_for_a_program_of_jax_runs_as_it_stands(cli, out, monkeypatch, case):
    cli.convert(GOLDEN / case, out, "--emit", "jax", pipeline="", to="st_moe")
    monkeypatch.syspath_prepend(out)
    monkeypatch.chdir(out.parent)
    code = card_of(out).split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace(f"{case}-st_moe", out.name), names)
    sys.modules.pop("jax_st_moe")
    assert np.isfinite(names["outputs"]["logits"]).all()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("llama_gqa", None),
        ("gemma2_caps", "another attention than plain"),
        ("llama_square_tied", None),
        ("phi_square", None),
        ("cohere_square", None),
        ("gpt_neox_square", "another head than lm_head"),
        ("bert_square", "another model than a decoder"),
    ],
)
def test_vllm_serves_programs_of_plain_decoders(cli, out, case, reason):
    words = ("--emit", "torch", "--dry-run", "--format", "json")
    plan = cli.convert(GOLDEN / case, out, *words, pipeline="", to="st_moe").json()
    engines = {e["engine"]: e for e in plan["engines"]}
    assert engines["vLLM"]["runs"] == (reason is None)
    assert reason is None or reason in engines["vLLM"]["reasons"][0]
    assert engines["SGLang"]["reasons"] == ["not measured with programs"]


def test_the_page_of_a_receipt_is_written_of_a_changed_folder_too(cli, dense, out, tmp_path):
    cli.convert(dense, out)
    cli("verify", out, "--html", tmp_path / "right.html")
    edit_json(out / "config.json", use_cache=False)
    cli("verify", out, "--html", tmp_path / "wrong.html", code=3, says="config.json")
    right, wrong = ((tmp_path / f"{name}.html").read_text() for name in ("right", "wrong"))
    assert "as the manifest says" in right
    assert "NOT" not in right
    assert "NOT as the manifest says" in wrong


def test_a_card_tells_how_an_engine_reads_the_model(cli, dense, out):
    cli.convert(dense, out)
    card = card_of(out)
    runs = re.sub(r"[0-9.]+", "N", card[card.index("- Runs in") :].split("\n")[0])
    assert "SGLang N (code read), llama" in runs
    assert "(as gguf:llama)" in runs
    assert "| yes | as a file of its own, which moecc convert --to gguf:llama writes |" in card


@pytest.mark.parametrize(
    ("case", "pipeline", "tags"),
    [
        ("llama_gqa", "", ["moecc"]),
        ("mixtral_gqa", "", ["moe", "moecc"]),
        ("llama_gqa", "upcycle{experts=4}", ["moe", "upcycled", "moecc"]),
    ],
)
def test_what_was_not_upcycled_is_not_tagged_so(cli, out, case, pipeline, tags):
    cli.convert(GOLDEN / case, out, pipeline=pipeline, to="auto")
    assert front(out)["tags"] == tags
