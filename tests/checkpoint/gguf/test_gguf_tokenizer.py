"""The tokenizer files that are made of a GGUF file's vocabulary."""

import json

import pytest

from moecc.formats.gguf.reader import open_gguf

tokenizers = pytest.importorskip("tokenizers")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"


def byte_alphabet():
    """Return GPT-2's character for each byte: itself where it is visible, else from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible}
    table |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "Ċ Ċ", "Ġ Ġ", "Ã ©"]


def byte_level(
    small_model,
    pre="smollm",
    *,
    merges=MERGES,
    extra=(("<|end|>", CONTROL), ("<think>", USER_DEFINED)),
    rows=512,
):
    """Return a model with the 256 bytes, the products of the merges, and added tokens."""
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    kinds = [NORMAL] * len(tokens) + [kind for _, kind in extra]
    tokens += [token for token, _ in extra]
    builder = small_model(vocab=rows)
    builder.key("tokenizer.ggml.model", "string", "gpt2")
    builder.key("tokenizer.ggml.pre", "string", pre)
    builder.array("tokenizer.ggml.tokens", "string", tokens)
    builder.array("tokenizer.ggml.token_type", "i32", kinds)
    builder.array("tokenizer.ggml.merges", "string", merges)
    return builder


def sentence_piece(small_model, pieces, *, bytes_too=True):
    tokens = ["<unk>", "<s>", "</s>"]
    kinds = [UNKNOWN, CONTROL, CONTROL]
    if bytes_too:
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        kinds += [BYTE] * 256
    scores = [0.0] * len(tokens) + [score for _, score in pieces]
    tokens += [piece for piece, _ in pieces]
    kinds += [NORMAL] * len(pieces)
    builder = small_model(vocab=len(tokens))
    builder.key("tokenizer.ggml.model", "string", "llama")
    builder.array("tokenizer.ggml.tokens", "string", tokens)
    builder.array("tokenizer.ggml.token_type", "i32", kinds)
    return builder.array("tokenizer.ggml.scores", "f32", scores)


def opened(builder, path):
    return open_gguf(builder.write(path / "x.gguf"))


def content(checkpoint, name):
    data = checkpoint.companions()[name]
    assert isinstance(data, bytes)
    return json.loads(data)


def turned(builder, path):
    """Return the tokenizer, as the library reads it."""
    data = opened(builder, path).companions()["tokenizer.json"]
    return tokenizers.Tokenizer.from_str(data.decode())


def reason(builder, path):
    """Return why there is no tokenizer."""
    checkpoint = opened(builder, path)
    assert checkpoint.companions() == {}
    (remark,) = checkpoint.remarks()
    assert remark.startswith("no tokenizer could be made from this file: ")
    return remark


def test_merges_and_added_tokens(small_model, tmp_path):
    tokenizer = turned(byte_level(small_model), tmp_path)
    assert tokenizer.get_vocab_size() == 256 + len(MERGES) + 2
    encoding = tokenizer.encode("the the<|end|>a<think>123")
    assert encoding.tokens == ["t", "he", "Ġthe", "<|end|>", "a", "<think>", "1", "2", "3"]
    assert encoding.ids[3] == 256 + len(MERGES)
    assert tokenizer.decode(encoding.ids) == "the thea<think>123"
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False).count("<|end|>") == 1


@pytest.fixture
def smollm(small_model, tmp_path):
    return turned(byte_level(small_model), tmp_path)


def special(builder, **ids):
    for name, number in ids.items():
        builder.key(f"tokenizer.ggml.{name}_token_id", "u32", number)
    return builder


def test_first_and_last_token(small_model, tmp_path):
    end = 256 + len(MERGES)
    builder = special(byte_level(small_model), bos=end, eos=end + 1)
    assert turned(builder, tmp_path).encode("a").tokens == ["a"]
    builder.key("tokenizer.ggml.add_bos_token", "bool", 1)
    assert turned(builder, tmp_path).encode("a").tokens == ["<|end|>", "a"]
    builder.key("tokenizer.ggml.add_eos_token", "bool", 1)
    tokenizer = turned(builder, tmp_path)
    assert tokenizer.encode("a").tokens == ["<|end|>", "a", "<think>"]
    pair = tokenizer.encode("a", "b")
    assert pair.tokens == ["<|end|>", "a", "<think>", "<|end|>", "b", "<think>"]
    assert pair.type_ids == [0, 0, 0, 1, 1, 1]
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


def test_configs_beside_the_tokenizer(small_model, tmp_path):
    end = 256 + len(MERGES)
    builder = special(byte_level(small_model), bos=end, eos=end, padding=end + 1, eot=end + 1)
    builder.key("tokenizer.chat_template", "string", "{{ messages }} ▁")
    checkpoint = opened(builder, tmp_path)
    assert content(checkpoint, "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "pad_token": "<think>",
        "chat_template": "{{ messages }} ▁",
    }
    assert content(checkpoint, "generation_config.json") == {
        "bos_token_id": end,
        "eos_token_id": [end, end + 1],
        "pad_token_id": end + 1,
    }
    assert sorted(checkpoint.companions()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert checkpoint.remarks() == []


def test_files_without_a_usable_vocabulary(small_model, tmp_path):
    assert "tokenizer.ggml.model: the file does not state" in reason(small_model(), tmp_path)
    unknown = small_model().key("tokenizer.ggml.model", "string", "t5")
    assert "does not know this kind of tokenizer" in reason(unknown, tmp_path)
    nothing = byte_level(small_model).drop("tokenizer.ggml.pre")
    assert "tokenizer.ggml.pre: the file does not state" in reason(nothing, tmp_path)
    assert "more tokens than the embedding" in reason(byte_level(small_model, rows=64), tmp_path)
    odd = byte_level(small_model).drop("tokenizer.ggml.merges")
    odd.array("tokenizer.ggml.merges", "string", ["a zz"])
    assert "not a valid merge" in reason(odd, tmp_path)
    short = byte_level(small_model).drop("tokenizer.ggml.token_type")
    short.array("tokenizer.ggml.token_type", "i32", [1, 1])
    assert "not one number a token" in reason(short, tmp_path)
    flag = byte_level(small_model).key("tokenizer.ggml.add_bos_token", "u32", 1)
    assert "neither true nor false" in reason(flag, tmp_path)
    twice = byte_level(small_model, extra=[("a", CONTROL)])
    assert "two ids have the token 'a'" in reason(twice, tmp_path)
    kinds = byte_level(small_model, extra=[("<|end|>", 9)])
    assert "unknown type of a token" in reason(kinds, tmp_path)


PIECES = [
    *((character, -100.0 - index) for index, character in enumerate("abcdehlotw" + SPACE)),
    *((piece, -float(rank)) for rank, piece in enumerate(["he", "ll", "hell", "hello"], 1)),
    *((piece, -float(rank)) for rank, piece in enumerate([f"{SPACE}hello", f"{SPACE}w"], 10)),
]


def test_sentence_piece(small_model, tmp_path):
    tokenizer = turned(sentence_piece(small_model, PIECES), tmp_path)
    text = "hello wé  hello"
    encoding = tokenizer.encode(text)
    assert encoding.tokens == [
        "<s>",
        f"{SPACE}hello",
        f"{SPACE}w",
        "<0xC3>",
        "<0xA9>",
        SPACE,
        f"{SPACE}hello",
    ]
    assert tokenizer.decode(encoding.ids) == text
    assert tokenizer.encode("hell</s>he").tokens == ["<s>", SPACE, "hell", "</s>", SPACE, "he"]


def test_control_tokens_are_never_merged_from_text(small_model, tmp_path):
    pieces = [("<", -1.0), ("s", -2.0), (">", -3.0), ("<s", -4.0), (SPACE, -5.0)]
    model = content(opened(sentence_piece(small_model, pieces), tmp_path), "tokenizer.json")
    assert model["model"]["merges"] == [["<", "s"]]


@pytest.mark.parametrize("pre", ["default", "no-such-rule"])
def test_a_rule_that_is_not_known(pre, small_model, tmp_path):
    text = reason(byte_level(small_model, pre), tmp_path)
    assert "does not know how this tokenizer cuts text" in text
    assert pre in text
    assert "smollm" in text


def test_named_chat_templates(small_model, tmp_path):
    builder = byte_level(small_model).key("tokenizer.chat_template", "string", "a")
    builder.key("tokenizer.chat_template.tool_use", "string", "b")
    config = content(opened(builder, tmp_path), "tokenizer_config.json")
    assert config["chat_template"] == [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
    ]
