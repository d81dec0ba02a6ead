import dataclasses
import json
import re
from pathlib import Path

import pytest

from moecc.formats.modelcard import CardFacts, front_matter, hub_repository, model_card, read_card

FACTS = CardFacts(
    title="smol-moe",
    family_from="llama",
    family_to="mixtral",
    command="moecc convert SOURCE OUT -p 'upcycle{experts=8 top-k=2}' --to mixtral --seed 3",
    receipt=("Promised: reassociation", "Measured: nothing", "Runs in: moecc"),
    dtype="bf16",
    parameters=691_600_000,
    active_parameters=214_100_000,
    moecc_version="0.1.0",
)


def test_a_card_says_what_was_done():
    card = model_card(FACTS)
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    assert card.splitlines()[:8] == [*front, "- moe", "- upcycled", "- moecc", "---"]
    numbers = ("691,600,000", "214,100,000", "--seed 3")
    words = ("upcycle{experts=8 top-k=2}", "reassociation", "bf16", "AutoModelForCausalLM")
    for part in (*numbers, *words, "moecc verify"):
        assert part in card
    assert card.endswith("\n")
    assert "\n\n\n" not in card


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", None])
@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_the_snippet_is_python_and_names_the_library(task: str, auto_class: str | None):
    card = model_card(dataclasses.replace(FACTS, task=task, auto_class=auto_class))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    library = "transformers" if auto_class else "moecc"
    assert f"library_name: {library}\npipeline_tag: {task}\n" in card
    assert re.search(rf"(from|import) {library}\b", code)
    assert ("generate(" in code) == (task == "text-generation")


def test_a_licence_is_never_invented():
    assert "license" not in model_card(FACTS)
    licence = {"license": "other", "license_name": "my licence: v1", "license_link": "LICENSE"}
    kept = {key: (value,) for key, value in licence.items()}
    card = model_card(dataclasses.replace(FACTS, source_card=kept, base_model="me/tiny"))
    assert 'license: other\nlicense_name: "my licence: v1"\nlicense_link: LICENSE\n' in card
    assert "base_model:\n- me/tiny\nbase_model_relation: finetune\n" in card


def test_language_and_data_sets_are_kept():
    kept = {"language": ("en", "no"), "datasets": ("me/text",)}
    card = model_card(dataclasses.replace(FACTS, source_card=kept))
    assert 'language:\n- en\n- "no"\ndatasets:\n- me/text\n' in card


def test_engines_training_and_what_would_serve_it():
    engines = (("vLLM 0.32.0", True, ""), ("SGLang 0.5.23", False, "tied | heads"))
    facts = dataclasses.replace(FACTS, engines=engines, serving="No engine.", training="Do so.")
    card = model_card(facts)
    assert "| vLLM 0.32.0 | yes |  |\n| SGLang 0.5.23 | no | tied \\| heads |\n" in card
    assert "\n\nNo engine.\n" in card
    assert "## Train it on\n\nDo so.\n" in card


def test_a_gguf_file_and_a_dense_model():
    card = model_card(dataclasses.replace(FACTS, file="model.gguf", is_sparse=False))
    assert "library_name: gguf\n" in card
    assert "tags:\n- moecc\n---" in card
    assert "llama-cli -m model.gguf" in card
    assert "A dense model in the `mixtral` layout" in card


def test_digests_and_notes_are_listed():
    facts = dataclasses.replace(FACTS, digests={"a|b.safetensors": "0" * 64}, notes=("from Q4_1",))
    card = model_card(facts)
    assert "| file | sha256 |\n|---|---|\n" in card
    assert f"| `a\\|b.safetensors` | `{'0' * 64}` |" in card
    assert "- from Q4\\_1" in card


def test_foreign_words_cannot_break_out_of_their_place():
    evil = "x`\n# <script>alert(1)</script>\x1b[31m \u202e"
    facts = dataclasses.replace(
        FACTS, title=evil, command=evil, receipt=(evil,), notes=(evil,), base_model=evil,
        source_card={"license": ("mit\nevil: true",)}, digests={evil: "0" * 64},
    )  # fmt: skip
    card = model_card(facts)
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert "evil: true" not in card.splitlines()
    front = card.split("---\n")[1].splitlines()
    assert front[0] == 'license: "mit\\nevil: true"'
    outside_code = card.split("```")[0] + card.split("```")[2]
    assert "<script>" not in outside_code.replace("\\<script\\>", "").split("`", 1)[0]


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\nlicense: mit", {"license": "apache-2.0"}),
        ("\ufeff---\r\nlicense: 'mit'  \r\n---\r\n", {"license": "mit"}),
        ('---\nlicense: "mit" \nlanguage: en\n---', {"license": "mit"}),
        ("---\nlicense:\n- mit\n---", {"license": "mit"}),
        ("---\nlicense: [mit]\n---", {"license": "mit"}),
        ("---\nlicense: mit # really\n---", {"license": "mit"}),
        ("---\nlicense:\nlanguage: en\n---", {}),
        ("---\nlanguage: en\n---\nlicense: mit", {}),
        ("license: mit", {}),
        ("", {}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags:\n- x\n---",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
    ],
)
def test_the_licence_of_a_card_is_found(text, licence):
    found = front_matter(text)
    assert {key: found[key] for key in licence} == {key: (v,) for key, v in licence.items()}
    assert found.keys() - licence.keys() <= {"language"}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("language: en", {"language": ("en",)}),
        ("language: [en, 'de']", {"language": ("en", "de")}),
        ('language:\n- en\n  - "de"\nx: y', {"language": ("en", "de")}),
        ("datasets:\n- a/b # large\n-\n- c/d", {"datasets": ("a/b",)}),
        ("language:\nlicense: mit", {"license": ("mit",)}),
        ("tags:\n- en", {}),
    ],
)
def test_lists_of_a_card_are_found(text, kept):
    assert front_matter(f"---\n{text}\n---\n") == kept


def test_the_card_of_a_folder_is_read_and_a_broken_one_stops_nothing(tmp_path):
    card = tmp_path / "README.md"
    assert read_card(tmp_path) == {}
    card.write_text("---\nlicense: mit\n---\n")
    assert read_card(tmp_path) == {"license": ("mit",)}
    card.write_bytes(b"\xff\xfe")
    assert read_card(tmp_path) == {}
    card.unlink()
    card.symlink_to("/etc/hostname")
    assert read_card(tmp_path) == {}


@pytest.mark.parametrize(
    ("path", "repository"),
    [
        ("/cache/hub/models--me--tiny/snapshots/0123", "me/tiny"),
        ("/cache/hub/models--gpt2/snapshots/0123", "gpt2"),
        ("/cache/hub/models--a--b--c/snapshots/0123", None),
        ("/models/tiny", None),
    ],
)
def test_the_hub_name_comes_from_the_cache_layout_only(path, repository):
    assert hub_repository(Path(path)) == repository


def test_a_title_with_quotes_stays_a_string():
    card = model_card(dataclasses.replace(FACTS, title='a"b'))
    assert "folder = " + json.dumps('a"b') in card
