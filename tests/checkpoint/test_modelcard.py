import dataclasses

import pytest

from moecc.formats.modelcard import CardFacts, front_matter, model_card, read_card

FACTS = CardFacts(
    title="smol-moe",
    source="smol",
    family_from="llama",
    family_to="mixtral",
    command="moecc convert SOURCE OUT -p 'upcycle{experts=8 top-k=2}' --to mixtral --seed 3",
    receipt=("Promised: reassociation", "Measured: nothing", "Runs in: moecc"),
    dtype="bf16",
    parameters=691_600_000,
    active_parameters=214_100_000,
    moecc_version="0.1.0",
)


def test_a_licence_is_never_invented():
    assert "license" not in model_card(FACTS)
    licence = {"license": "other", "license_name": "my licence: v1", "license_link": "LICENSE"}
    kept = {key: (value,) for key, value in licence.items()}
    card = model_card(dataclasses.replace(FACTS, source_card=kept, base_models=("me/tiny",)))
    assert 'license: other\nlicense_name: "my licence: v1"\nlicense_link: LICENSE\n' in card
    assert "base_model:\n- me/tiny\nbase_model_relation: finetune\n" in card


def test_foreign_words_cannot_break_out_of_their_place():
    evil = "x`\n# <script>alert(1)</script>\x1b[31m \u202e"
    facts = dataclasses.replace(
        FACTS, title=evil, command=evil, receipt=(evil,), notes=(evil,), base_models=(evil,),
        story=(evil,),
        source_card={"license": ("mit\nevil: true",)},
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
        ("\ufeff---\r\nlicense: 'mit'  \r\n---\r\n", {"license": "mit"}),
        ('---\nlicense: "mit" \nlanguage: en\n---', {"license": "mit"}),
        ("---\nlicense:\n- mit\n---", {"license": "mit"}),
        ("---\nlicense: [mit]\n---", {"license": "mit"}),
        ("---\nlicense_name: [mine, its]\n---", {"license_name": "mine"}),
        ("---\nlicense: mit # really\n---", {"license": "mit"}),
        ("---\nlicense:\nlanguage: en\n---", {}),
        ("---\nlanguage: en\n---\nlicense: mit", {}),
        ("", {}),
    ],
)
def test_the_licence_of_a_card_is_found(text, licence):
    found = front_matter(text)
    assert {key: found[key] for key in licence} == {key: (v,) for key, v in licence.items()}
    assert found.keys() - licence.keys() <= {"language"}


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("extra_gated_prompt: >\n  a\n\n  license: b\nlicense: mit",
         (" >", "  a", "", "  license: b")),
        ("extra_gated_fields:\n- a: text\nlicense: mit", ("", "- a: text")),
        ("extra_gated_prompt: a\x1bb\nlicense: mit", None),
        ("extra_gated_a b: c\nlicense: mit", None),
    ],
)  # fmt: skip
def test_the_terms_of_a_card_are_kept_as_they_stand(text, gate):
    card = front_matter(f"---\n{text}\n---\n")
    assert card.pop("license") == ("mit",)
    assert list(card.values()) == ([] if gate is None else [gate])
    facts = dataclasses.replace(FACTS, source_card=card)
    assert front_matter(model_card(facts)).items() >= card.items()


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
