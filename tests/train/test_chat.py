"""Conversations: chat templates in their sandbox, and the loss on answers alone."""

import json

import numpy as np
import pytest

from moecc.chat import ChatTemplate, read_template
from moecc.errors import InputError
from moecc.train.objectives import IGNORED, ExampleRows, Room
from moecc.train.tokens.encoders import byte_tokenizer
from moecc.train.tokens.folder import open_tokens

from .tiny import draw_weights, make_model, write_lines

CHATML = """{{ bos_token }}{% for message in messages %}
<|{{ message['role'] }}|>
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim }}<end>{% endgeneration %}
{% else %}
{{ message['content'] }}<end>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""
CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": " 4 "},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Gladly."},
]


def tokenizer(folder, template=CHATML):
    """Write a tokenizer of bytes with a chat template."""
    pytest.importorskip("tokenizers")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    settings = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def texts(out):
    """Return what each row of a folder shows, and what of it is learned."""
    folder = open_tokens(out)
    rows = ExampleRows(folder, folder.facts.special, None, Room(256, 0, packing=False))
    pairs = []
    for row in range(rows.rows):
        (segment,) = rows.segments(row, np.random.default_rng(0))
        shown_and_learned = segment.tokens, segment.targets[segment.targets != IGNORED]
        pairs.append(tuple(bytes(ids[ids < 256].tolist()).decode() for ids in shown_and_learned))
    return pairs


def test_the_loss_is_on_answers_alone(moecc, tmp_path):
    model = tokenizer(tmp_path / "model")
    other = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    rows = [{"messages": CHAT}, {"messages": other, "id": 3}]
    source = write_lines(tmp_path / "chat.jsonl", *rows)
    words = ("tokens", source, "--tokenizer", model, "--kind", "chat", "--out")
    assert moecc(*words, tmp_path / "out").code == 0
    asked = "<|user|>\n2 + 2?<end>\n<|assistant|>\n"
    again = f"{asked}4<end><|user|>\nThanks.<end>\n<|assistant|>\n"
    assert texts(tmp_path / "out") == [
        (f"{asked}4<end", "4<end>"),
        (f"{again}Gladly.<end", "Gladly.<end>"),
        ("<|user|>\nHello.<end>\n<|assistant|>\nHi.<end", "Hi.<end>"),
    ]
    assert open_tokens(tmp_path / "out").ids(0, 1).tolist() == [259]  # <bos>, which it writes
    # Answers of a conversation are held out together.
    assert moecc(*words, tmp_path / "parts", "--hold-out", "0.5").code == 0
    counts = [open_tokens(tmp_path / "parts" / n).facts.documents for n in ("train", "heldout")]
    assert sorted(counts) == [1, 2]


def test_conversations_under_one_system_prompt_are_held_out_by_their_questions(moecc, tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [system, {"role": "user", "content": f"{n}?"}, *CHAT[1:]]} for n in range(200)
    ]
    source = write_lines(tmp_path / "chat.jsonl", *rows)
    words = ("--tokenizer", tokenizer(tmp_path / "model"), "--kind", "chat", "--hold-out", "0.1")
    assert moecc("tokens", source, *words, "--out", tmp_path / "parts").code == 0
    train, held_out = (
        {shown.split("?")[0] for shown, _ in texts(tmp_path / "parts" / name)}
        for name in ("train", "heldout")
    )
    assert train
    assert held_out
    assert not train & held_out
    assert len(train) + len(held_out) == 200
    greeted = [{"messages": [system, CHAT[3], *row["messages"][1:]]} for row in rows]
    source = write_lines(tmp_path / "greeted.jsonl", *greeted)
    done = moecc("tokens", source, *words, "--out", tmp_path / "none")
    assert done.code == 1
    assert "with the same messages before the first answer" in done.err


def test_the_splits_of_a_data_set_are_no_corpus(moecc, tmp_path):
    folder = tmp_path / "dsd"
    for name in ("test", "train"):
        (folder / name).mkdir(parents=True)
        write_lines(folder / name / "data.jsonl", {"text": name})
        for file in ("state.json", "dataset_info.json", "../dataset_dict.json"):
            (folder / name / file).write_text("{}")
    words = ("--tokenizer", "bytes", "--out", tmp_path / "out")
    done = moecc("tokens", folder, *words)
    assert done.code == 1
    assert "several splits" in done.err
    assert "found: test, train" in done.err
    assert f"hint: moecc tokens {folder / 'train'} …" in done.err
    assert moecc("tokens", folder / "train", *words).code == 0
    assert open_tokens(tmp_path / "out").facts.documents == 1


def test_tables_of_datasets_are_read(moecc, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"id": [1], "messages": [CHAT]})
    folder = tmp_path / "saved"
    folder.mkdir()
    with arrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    parquet.write_table(table, tmp_path / "chat.parquet")
    model = tokenizer(tmp_path / "model")
    for source in (folder, tmp_path / "chat.parquet"):
        out = tmp_path / f"tokens-{source.name}"
        done = moecc("tokens", source, "--tokenizer", model, "--kind", "chat", "--out", out)
        assert done.code == 0, done.err
        assert [learned for _, learned in texts(out)] == ["4<end>", "Gladly.<end>"]
    (folder / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    done = moecc("tokens", folder, "--tokenizer", model, "--out", tmp_path / "x")
    assert done.code == 1
    assert "not Arrow" in done.err


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hello"}, "not a conversation"),
        ({"messages": [{"role": "user"}]}, "chat.jsonl:1, message 0: not a message"),
        ({"text": "hello"}, "the record has no 'messages'"),
        ({"messages": [{"role": "robot", "content": "x"}, *CHAT]}, "no robots"),
    ],
)
def test_a_wrong_conversation_is_named(moecc, tmp_path, record, words):
    robots = "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    model = tokenizer(tmp_path / "model", robots + CHATML)
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    done = moecc("tokens", tmp_path / "chat.jsonl", "--tokenizer", model, "--kind", "chat",
                 "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 1
    assert words in done.err
    assert done.err.count("error:") == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for x in range(99999) %}{% for y in range(999) %}{{ '0' * 9999 }}{% endfor %}"
         "{% endfor %}", "more than"),
        ("{{ '0' % messages }}{{ 1 / 0 }}", "the chat template fails"),
        ("{% for %}", "not a chat template"),
    ],
)  # fmt: skip
def test_a_template_is_a_program_of_strangers(template, words):
    with pytest.raises(InputError, match=words):
        ChatTemplate(template, "x", {}).render(CHAT, asks=True)


def test_a_template_that_cannot_be_split_is_rejected():
    template = "{% if add_generation_prompt %}a{% else %}b{% endif %}"
    with pytest.raises(InputError, match="otherwise than it asks for one"):
        list(ChatTemplate(template, "x", {}).turns(CHAT))
    with pytest.raises(InputError, match="no chat template"):
        read_template({"tokenizer_config.json": b"{}"}, "x")


def test_a_model_answers(moecc, tmp_path):
    pytest.importorskip("jax")
    model = tokenizer(draw_weights(make_model(tmp_path / "model")))
    answers = []
    for words in (
        ("Hi", "--chat"),
        ('[{"role": "user", "content": "Hi"}]', "--chat"),
        ("<bos><|user|>\nHi<end>\n<|assistant|>\n",),
    ):
        done = moecc("generate", model, "--prompt", *words, "--tokens", 5, "--format", "json")
        assert done.code == 0, done.err
        answers.append(done.json()["texts"][0]["tokens"])
    assert answers[0] == answers[1] == answers[2]
