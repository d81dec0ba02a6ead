"""Token folders: what is read, what is written, what is rejected, what is held out."""

import gzip
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.cli.main import main
from moecc.errors import InputError, Problem, UsageError
from moecc.train.tokens import documents, encoders
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.folder import open_tokens

from .tiny import tokenize, tokens_of, write_lines


def texts_of(folder):
    """Return the documents of a token folder."""
    tokens = open_tokens(folder)
    pairs = pairwise(tokens.starts)
    return [bytes(tokens.ids(a, b).astype(np.uint8)).decode() for a, b in pairs]


def problems(call, *arguments):
    """Return the problems that a call raises."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return [str(p) for p in caught.value.problems]


def test_documents_come_back_as_they_were(tmp_path):
    folder, out = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    (folder / "b.txt").write_text("second ü\n")
    (folder / "a.md").write_text("first")
    (folder / ".hidden").write_bytes(b"\xff")
    write_lines(folder / "c.jsonl", {"text": "third"}, {"text": "fourth", "n": 1})
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"fifth"))
    facts = tokenize(out, folder)[""]
    assert texts_of(out) == ["first", "second ü\n", "third", "fourth", "fifth"]
    assert open_tokens(out).facts == facts
    assert (facts.documents, facts.tokens, facts.dtype) == (5, 31, "uint16")
    assert [source.name for source in facts.sources] == ["a.md", "b.txt", "c.jsonl", "d.txt.gz"]
    assert facts.largest_id == 0xC3


@settings(max_examples=20)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12))
def test_every_text_is_kept_once(texts):
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        source = write_lines(Path(folder, "x.jsonl"), *({"text": t} for t in texts))
        filled = [t for t in texts if t.strip()]
        kept = [t for n, t in enumerate(filled) if t.strip() not in map(str.strip, filled[:n])]
        if not kept:
            with pytest.raises(InputError, match="the corpus is empty"):
                tokenize(out, source)
            return
        facts = tokenize(out, source)[""]
        assert texts_of(out) == kept
        assert facts.duplicates == len(filled) - len(kept)


def test_held_out_documents_are_in_one_part_whatever_their_order(tmp_path):
    records = [{"text": f"document {n // 2}"} for n in range(400)]
    for name, ordered in (("x", records), ("y", records[::-1])):
        source = write_lines(tmp_path / f"{name}.jsonl", *ordered)
        tokenize(tmp_path / name, source, hold_out=0.2)
    train, held_out = (set(texts_of(tmp_path / "x" / part)) for part in ("train", "heldout"))
    assert not train & held_out
    assert len(train) + len(held_out) == 200
    assert 20 < len(held_out) < 60
    assert set(texts_of(tmp_path / "y" / "heldout")) == held_out
    assert open_tokens(tmp_path / "x" / "train").facts.held_out == "train 0.2"
    with pytest.raises(InputError, match="it has token folders in it"):
        open_tokens(tmp_path / "x")


def test_examples_have_prompts_and_labels(tmp_path):
    source = write_lines(
        tmp_path / "x.jsonl",
        {"a": "one", "b": 2, "label": "yes"},
        {"a": "two", "b": 3, "label": "no"},
        {"a": "two", "b": 4, "label": "yes"},
    )
    form = DocumentFormat("labelled", prompt="{a} and {b}?", completion=" {label}")
    facts = tokenize(tmp_path / "out", source, format=form)[""]
    folder = open_tokens(tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one and 2? yes", "two and 3? no", "two and 4? yes"]
    assert folder.completions.tolist() == [10, 10, 10]
    assert folder.labels.tolist() == [0, 1, 0]
    assert [(label.text, label.count) for label in facts.labels] == [(" yes", 2), (" no", 1)]
    assert bytes(facts.labels[0].tokens) == b" yes"


def test_a_part_has_the_labels_of_the_whole(tmp_path):
    """Among fewer the likeliest would be right more often."""
    answers = ["yes", "no"] * 20 + ["rarely"]
    records = [{"prompt": f"is it {n}?", "completion": answer} for n, answer in enumerate(answers)]
    source, form = write_lines(tmp_path / "x.jsonl", *records), DocumentFormat("labelled")
    parts = tokenize(tmp_path / "out", source, format=form, hold_out=0.2)
    counts = [{label.text: label.count for label in facts.labels} for facts in parts.values()]
    assert all(set(count) == {"yes", "no", "rarely"} for count in counts)
    assert sorted(count["rarely"] for count in counts) == [0, 1]


def test_json_that_is_read_as_text_is_a_remark(tmp_path, moecc):
    for name in ("a.json", "b.txt"):
        (tmp_path / name).write_text('[{"text": "c"}]')
    done = moecc("tokens", tmp_path, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert done.err == (
        "remark: read as text: 1 .json file, such as a.json; records are read from .jsonl\n"
    )


def test_empty_documents_are_a_remark(tmp_path, moecc):
    write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": "b"}, {"text": " \n"})
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_text("c\n")
    done = moecc("tokens", tmp_path, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert done.err == "remark: left out: 3 empty documents, of a.jsonl for example\n"
    assert [s.empty for s in open_tokens(tmp_path / "out").facts.sources] == [2, 1, 0]


def test_a_number_is_no_document(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", {"text": "a"}, {"text": 3})
    with pytest.raises(InputError) as caught:
        tokenize(tmp_path / "out", source)
    assert caught.value.problems == (
        Problem("'text' is not a text", f"{source}:2", "a text", "3", "--field names another key"),
    )


@pytest.mark.parametrize(
    ("content", "split", "message", "hint"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "line", "not a text", "of a folder, --include"),
        (b"\xe9 \0", "file", "not a text", "of a folder, --include"),
        ("a".encode("utf-16"), "file", "the text is not UTF-8", "iconv -f utf-16"),
        (b"\xe9", "file", "the text is not UTF-8", "if it is text, iconv -f latin1"),
    ],
)
def test_what_is_no_text_is_told_from_another_encoding(tmp_path, content, split, message, hint):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError) as caught:
        tokenize(tmp_path / "out", tmp_path / "x", format=DocumentFormat(split=split))
    (problem,) = caught.value.problems
    assert problem.message == message
    assert problem.hint.startswith(hint)


def test_all_problems_of_the_texts_come_at_once(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": 3}\nnope\n{"body": "b"}\n{"text": []}\n[]\n')
    (tmp_path / "y.txt").write_bytes(b"latin \xe9")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"short")[:-6])
    (tmp_path / "w.jsonl").write_text('{"text": "\\ud800"}\n')
    sources = (tmp_path / name for name in ("x.jsonl", "y.txt", "z.txt.gz", "w.jsonl"))
    texts = problems(tokenize, tmp_path / "out", *sources)
    assert [text.split("\n")[0].removeprefix(f"{tmp_path}/") for text in texts] == [
        "x.jsonl:1, 4: 'text' is not a text",
        "x.jsonl:2: not JSON: Expecting value",
        "x.jsonl:3: the record has no 'text'",
        "x.jsonl:5: not an object",
        "y.txt: the text is not UTF-8",
        "z.txt.gz: not a whole gzip file: Compressed file ended before the end-of-stream marker was"
        " reached",
        "w.jsonl:1: 'text' has half a surrogate pair",
    ]
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "--kind chat reads conversations"),
        ({"prompt": "a", "completion": "b"}, "--kind examples reads prompts and completions"),
        ({"body": "a"}, "--field names another key"),
    ],
)
def test_records_of_another_kind_are_one_problem_with_a_way_out(tmp_path, record, hint):
    source = write_lines(tmp_path / "x.jsonl", *[record] * 1200)
    with pytest.raises(InputError) as caught:
        tokenize(tmp_path / "out", source)
    where, found = f"{source}:1, 2, 3, 4 and 1,196 more", ", ".join(record)
    assert caught.value.problems == (Problem("the record has no 'text'", where, None, found, hint),)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (DocumentFormat("examples", field="q"), "--field: it has no effect"),
        (DocumentFormat(prompt="{q}"), "--prompt: it has no effect"),
        (DocumentFormat("chat", "messages", completion="{q}"), "--completion: it has no effect"),
        (DocumentFormat("examples", completion="q"), "hint: --completion '{q}'"),
    ],
)
def test_options_without_effect_are_rejected(tmp_path, form, message):
    with pytest.raises(UsageError, match=message):
        tokenize(tmp_path / "out", tmp_path / "x.jsonl", format=form)


def test_a_prompt_that_is_always_the_same_is_a_remark(tmp_path, moecc):
    source = write_lines(tmp_path / "x.jsonl", {"q": "a", "completion": "b"})
    words = ("tokens", source, "--tokenizer", "bytes", "--kind", "examples", "--prompt")
    assert moecc(*words, "q", "--out", tmp_path / "same").err == (
        "remark: every prompt is 'q': {KEY} stands for a value of the record\n"
    )
    assert moecc(*words, "{q}", "--out", tmp_path / "own").err == ""


def test_a_list_in_the_place_of_lines_and_a_misspelt_tokenizer_have_a_way_out(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text('[{"text": "a"},\n{"text": "b"}]')
    with pytest.raises(InputError, match=r"jq -c '\.\[\]' makes lines"):
        tokenize(tmp_path / "out", source)
    with pytest.raises(InputError, match=r"did you mean 'x\.jsonl'"):
        tokenize(tmp_path / "out", source, tokenizer=str(tmp_path / "x.json"))


def test_an_empty_corpus_and_an_empty_part_are_rejected(tmp_path):
    out, blank, one = (tmp_path / name for name in ("out", "x.txt", "y.txt"))
    blank.write_text(" \n")
    one.write_text("one document")
    with pytest.raises(InputError, match="the corpus is empty"):
        tokenize(out, blank)
    with pytest.raises(InputError, match=r"no document is left for(?s:.*)found: 1 document in all"):
        tokenize(out, one, hold_out=0.5)
    with pytest.raises(InputError, match="another share, or more records"):
        tokenize(out, write_lines(tmp_path / "z.jsonl", {"text": "a"}), hold_out=0.5)
    with pytest.raises(InputError, match="no files of text"):
        tokenize(out, tmp_path, include=("*.csv",))
    with pytest.raises(InputError, match="no such file"):
        tokenize(out, tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="--hold-out"):
        tokenize(out, one, hold_out=1.0)
    assert list(tmp_path.glob("*out*")) == []


def test_long_documents_are_rejected_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT_BYTES", 64)
    source, out = tmp_path / "x.txt", tmp_path / "out"
    source.write_text("a line of text\n" * 20)
    for split in ("file", "paragraph", "form-feed"):
        with pytest.raises(InputError, match="--split"):
            tokenize(out, source, format=DocumentFormat(split=split))
    facts = tokenize(out, source, format=DocumentFormat(split="line"), deduplicate=False)
    assert facts[""].documents == 20


@pytest.fixture
def tokenizer(tmp_path):
    """A small word tokenizer with special tokens, as a checkpoint has it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "<extra_id_0>", "<extra_id_1>", "a", "b"]
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": {"content": "</s>"}, "pad_token": "<pad>", "mask_token": "<mask>",
               "bos_token": None}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def test_a_tokenizer_has_its_special_tokens(tmp_path, tokenizer, monkeypatch):
    # So small that texts are cut, and the process is replaced.
    monkeypatch.setattr(encoders, "PIECE_CHARACTERS", 8)
    monkeypatch.setattr(encoders, "_RESTART_CHARACTERS", 8)
    sources = (tmp_path / "x.txt", tmp_path / "y.txt")
    for source, text in zip(sources, ("a b a\nb a b\nb b\nc", "b"), strict=True):
        source.write_text(text)
    facts = tokenize(tmp_path / "out", *sources, tokenizer=str(tokenizer))[""]
    folder = open_tokens(tmp_path / "out")
    assert folder.ids(0, facts.tokens).tolist() == [7, 8, 7, 8, 7, 8, 8, 8, 0, 8]
    assert folder.starts.tolist() == [0, 9, 10]
    special = facts.special
    assert (special.bos, special.eos, special.pad, special.mask) == (None, 2, 3, 4)
    assert (special.before, special.after, special.sentinels) == ((1,), (2,), (5, 6))
    assert (facts.vocab_size, facts.tokenizer) == (9, "model")
    assert facts.tokenizer_digest.startswith("sha256:")


def test_damaged_folders_are_rejected(tmp_path):
    out = tokens_of("abc" * 10, tmp_path / "out")
    os.truncate(out / "tokens.bin", 40)
    (out / "starts.bin").unlink()
    size, missing = problems(open_tokens, out)
    assert "tokens.bin: the file is not of the size" in size
    assert "starts.bin" in missing
    path, wrong = out / "tokens.json", {"tokens": -1, "kind": "texts", "special": [], "labels": [3]}
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    texts = problems(open_tokens, out)
    for key in wrong:
        assert any(f"tokens.json: {key}" in text for text in texts), key
    path.write_text('{"schema": "moecc.tokens/9"}')
    with pytest.raises(InputError, match="of a version that this moecc does not read"):
        open_tokens(out)
    path.unlink()
    with pytest.raises(InputError, match="not a token folder"):
        open_tokens(out)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_writer_leaves_no_folder(tmp_path, end):
    records = ({"text": f"text {n}" * 50} for n in range(200))
    source = write_lines(tmp_path / "slow.jsonl", *records)
    code = (
        "import time, sys\nfrom moecc.train.tokens import documents as d\n"
        "read = d.DocumentReader.read\n"
        "def slow(self, path):\n  for one in read(self, path):\n    print('.', flush=True)\n"
        "    time.sleep(0.05)\n    yield one\nd.DocumentReader.read = slow\n"
        "from moecc.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    command = ["tokens", str(source), "--tokenizer", "bytes", "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    child.stdout.readline()
    child.send_signal(end)
    child.wait(20)
    child.stdout.close()
    assert not out.exists()
    left = list(tmp_path.glob(".out*"))
    if end == signal.SIGTERM:
        assert child.returncode == 143
        assert left == []
    else:
        assert len(left) == 1
        assert main(command) == 1
    assert main([*command, "--force"]) == 0
    assert open_tokens(out).facts.documents == 200
