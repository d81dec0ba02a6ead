"""Batches: what is in them, the same on any hosts and in any process, what is rejected."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.train.batches import open_batches
from moecc.train.recipe import Corpus, DataSection, Objective
from moecc.train.rows import ModelFacts
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.encoders import ByteEncoder
from moecc.train.tokens.make import Making, make_tokens

from .tiny import restored

EOS, PAD = 256, 257
SENTINELS = ByteEncoder.special.sentinels
PACKED = ("tokens", "segments", "positions", "mask")
DECODER = ModelFacts("decoder", 384, PACKED)
BOTH = ModelFacts("both", 384, (*PACKED, *(f"decoder_{n}" for n in PACKED)), decoder_start=0)


def write(place, *records, kind="documents"):
    source = place.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    form = DocumentFormat(kind, completion="{label}" if kind == "labelled" else "{completion}")
    make_tokens(Making((str(source),), "bytes", form, deduplicate=False), place)
    return str(place)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh "))
    documents = [
        {"text": "x" + "".join(rng.choice(letters, rng.integers(1, 120)))} for _ in range(60)
    ]
    return write(tmp_path_factory.mktemp("texts") / "t", *documents)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    records = [
        {"prompt": f"what is {n}?" * (n % 4 + 1), "completion": f" {n * n}"} for n in range(40)
    ]
    return write(tmp_path_factory.mktemp("examples") / "e", *records, kind="examples")


def opened(texts, model=DECODER, **options):
    options = {"batch": 4, "seq": 64, "evaluate": (Corpus(texts),), **options}
    return open_batches(DataSection((Corpus(texts),), **options), model)


def segments(batch, prefix=""):
    """Return row, number and tokens of each document of a batch; check what goes with them."""
    found = []
    for row, (numbers, tokens, positions, mask) in enumerate(
        zip(*(batch[f"{prefix}{name}"] for name in ("segments", "tokens", "positions", "mask")),
            strict=True)
    ):  # fmt: skip
        assert (mask == (numbers > 0)).all()
        assert (tokens[~mask] == PAD).all()
        assert (np.diff(numbers[mask]) >= 0).all()
        for number in range(1, numbers.max(initial=0) + 1):
            here = numbers == number
            assert positions[here].tolist() == list(range(here.sum()))
            found.append((row, number, tokens[here].tolist()))
    return found


def test_a_stream_has_every_token_once_and_predicts_the_next(texts):
    batches = opened(texts)
    folder = batches.folders["train/t"]
    rows = batches.rows["t"]
    assert rows == -(-(folder.facts.tokens + 60) // 64)
    counted = 0
    predicted = 0
    for number in range(-(-rows // 4)):
        batch = batches.batch(number)
        counted += int(batch["mask"].sum())
        targets, tokens, numbers = (batch[n] for n in ("targets", "tokens", "segments"))
        predicted += int((targets >= 0).sum())
        same = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0)
        assert (targets[:, :-1][same] == tokens[:, 1:][same]).all()
        # What follows the end of a text is another text, and not predicted.
        assert (targets[tokens == EOS] == -1).all()
        assert (targets[numbers == 0] == -1).all()
    # The last batch of an epoch has the first rows of the next.
    assert counted >= folder.facts.tokens + 60
    assert predicted >= folder.facts.tokens


def test_without_packing_a_row_is_a_document_or_a_part(texts):
    batches = opened(texts, packing=False)
    for number in range(5):
        batch = batches.batch(number)
        assert batch["segments"].max() == 1
        for row, _, tokens in segments(batch):
            targets = batch["targets"][row, : len(tokens)].tolist()
            assert targets[:-1] == tokens[1:]
            assert (targets[-1] == -1) == (tokens[-1] == EOS)


@pytest.mark.parametrize("packing", [True, False])
def test_spans_come_back_from_both_sequences(texts, packing):
    batches = opened(texts, BOTH, objective=Objective.SPANS, packing=packing, seq=48)
    documents = {bytes(d.ids(0, d.facts.tokens).astype(np.uint8)) for d in batches.folders.values()}
    (text,) = documents
    seen = 0
    assert batches.shape.decoder_seq == batches.batch(0)["decoder_tokens"].shape[1]
    for number in range(6):
        batch = batches.batch(number)
        encoders, decoders = segments(batch), segments(batch, "decoder_")
        assert [e[:2] for e in encoders] == [d[:2] for d in decoders]
        for (row, n, encoder), (_, _, decoder) in zip(encoders, decoders, strict=True):
            targets = batch["targets"][row][batch["decoder_segments"][row] == n]
            assert decoder == [0, *targets[:-1].tolist()]
            assert targets[-1] == encoder[-1] == EOS
            ids = restored(np.array(encoder), targets, SENTINELS, EOS)
            assert bytes(ids.astype(np.uint8)) in text
            seen += len(ids)
        assert (batch["targets"][batch["decoder_segments"] == 0] == -1).all()
    assert seen > 6 * 4 * 48 * (0.5 if packing else 0.3)


def test_masked_rows_predict_what_is_hidden(texts):
    batches = opened(texts, objective=Objective.MASKED)
    folder = batches.folders["train/t"]
    text = bytes(folder.ids(0, folder.facts.tokens).astype(np.uint8))
    hidden = total = 0
    for number in range(6):
        batch = batches.batch(number)
        for row, n, tokens in segments(batch):
            aims = batch["targets"][row][batch["segments"][row] == n]
            original = np.where(aims >= 0, aims, tokens)
            assert bytes(original.astype(np.uint8)) in text
            hidden += int((aims >= 0).sum())
            total += len(tokens)
    assert abs(hidden / total - 0.15) < 0.02


@pytest.mark.parametrize("packing", [True, False])
def test_only_completions_are_predicted(examples, packing):
    batches = opened(examples, objective=Objective.COMPLETION, packing=packing)
    seen = set()
    for number in range(10):
        batch = batches.batch(number)
        for row, n, tokens in segments(batch):
            aims = batch["targets"][row][batch["segments"][row] == n]
            answer = bytes(aims[aims >= 0][:-1].astype(np.uint8)).decode()
            assert aims[-1] == EOS
            text = bytes(np.array(tokens).astype(np.uint8)).decode()
            assert text.endswith(answer)
            question = text.removesuffix(answer).rpartition("what is ")[2].removesuffix("?")
            assert int(answer) == int(question) ** 2
            seen.add(int(question))
    assert len(seen) > 30


def test_completions_of_an_encoder_decoder(examples):
    batches = opened(examples, BOTH, objective=Objective.COMPLETION)
    assert batches.shape.decoder_seq == len(" 1521") + 1
    batch = batches.batch(0)
    for (row, n, prompt), (_, _, decoder) in zip(
        segments(batch), segments(batch, "decoder_"), strict=True
    ):
        aims = batch["targets"][row][batch["decoder_segments"][row] == n].tolist()
        assert prompt[-1] == aims[-1] == EOS
        assert decoder == [0, *aims[:-1]]
        question = bytes(prompt[:-1]).decode().rpartition("what is ")[2].removesuffix("?")
        assert int(bytes(aims[:-1])) == int(question) ** 2


def test_long_examples_are_cut_and_reported(tmp_path):
    records = [
        {"prompt": "p" * 50 + "q", "completion": "right"},
        {"prompt": "", "completion": "z" * 90},
    ]
    place = write(tmp_path / "e", *records, kind="examples")
    batches = opened(place, objective=Objective.COMPLETION, seq=16, batch=2, evaluate=())
    found = sorted(
        bytes(t for t in tokens if t < 256) for _, _, tokens in segments(batches.batch(0))
    )
    # Of 17 tokens that are seen or predicted, the end is only predicted.
    assert found == [b"p" * 10 + b"qright", b"z" * 16]
    # Without anything before it, all of a completion is predicted but its first token.
    aims = sorted(bytes(t for t in row if 0 <= t < 256) for row in batches.batch(0)["targets"])
    assert aims == [b"right", b"z" * 16]
    assert batches.remarks == ("e: 2 examples are cut, as they are longer than a sequence",)


def test_a_corpus_may_be_called_order(tmp_path):
    """The digest of the order of rows is none of a folder's."""
    places = [write(tmp_path / part, {"text": part * 9}) for part in ("a", "b")]
    named = (DataSection((Corpus(place, name="order"),), seq=8) for place in places)
    first, second = (open_batches(data, DECODER).digests for data in named)
    assert first["order"] == second["order"]
    assert first["train/order"] != second["train/order"]


def test_spans_that_are_rounded_are_reported(tmp_path):
    """Five letters hide 1 token, not 0.75; 400 need 20 spans of 3, and 101 sentinels are enough."""
    short, long = (write(tmp_path / n, {"text": n * size}) for n, size in (("s", 5), ("l", 400)))
    options = {"objective": Objective.SPANS, "seq": 512, "evaluate": ()}
    assert opened(long, BOTH, **options).remarks == ()
    assert opened(short, BOTH, **options).remarks == (
        "s: noise_density is 0.2 in whole tokens and spans, not 0.15",
        "s: mean_span is 1 in whole tokens and spans, not 3",
    )


def test_hosts_together_have_the_batch_of_one(texts):
    for options in ({}, {"objective": Objective.SPANS}):
        batches = opened(texts, BOTH if options else DECODER, batch=8, **options)
        whole = batches.batch(5)
        parts = [batches.batch(5, slice(2 * host, 2 * host + 2)) for host in range(4)]
        for name, array in whole.items():
            assert (np.concatenate([part[name] for part in parts]) == array).all()
        assert list(whole) == [*batches.shape.inputs, "targets"]
        for name, (shape, kind) in batches.shape.arrays().items():
            assert (whole[name].shape, whole[name].dtype.name) == (shape, kind)


def test_an_evaluation_is_fixed_and_has_each_row_once(texts):
    one = opened(texts, evaluate_batches=100, seed=1).evaluations["t"]
    other = opened(texts, evaluate_batches=100, seed=2).evaluations["t"]
    tokens = 0
    for number in range(one.batches):
        batch = one.batch(number)
        tokens += int(batch["mask"].sum())
        for name, array in other.batch(number).items():
            assert (batch[name] == array).all()
    folder = opened(texts).folders["train/t"]
    assert tokens == folder.facts.tokens + 60
    documents = np.concatenate([one.documents(number) for number in range(one.batches)])
    lengths = np.bincount(documents[documents >= 0])
    assert (lengths == np.diff(folder.starts) + 1).all()
    last = one.batch(one.batches - 1)
    assert last["tokens"].shape == (4, 64)
    assert opened(texts, evaluate_batches=2).evaluations["t"].batches == 2


def test_all_misfits_come_at_once(texts, examples, tmp_path):
    data = DataSection((Corpus(texts), Corpus(examples)), objective=Objective.COMPLETION)
    small = replace(DECODER, vocab=100, longest=64)
    with pytest.raises(InputError) as caught:
        open_batches(data, small)
    found = [str(p) for p in caught.value.problems]
    assert "longer than the model has positions for" in found[0]
    assert "ids beyond the vocabulary" in found[1]
    assert "the objective completion needs examples" in found[2]
    assert "ids beyond the vocabulary" in found[3]
    assert "special tokens of the objective completion are beyond the vocabulary" in found[4]
    assert len(found) == 5
    with pytest.raises(InputError) as caught:
        open_batches(DataSection((Corpus("absent"), Corpus("gone"))), DECODER)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("options", "model", "what"),
    [
        ({"objective": Objective.SPANS}, DECODER, "hidden spans are for an encoder-decoder"),
        ({"objective": Objective.CAUSAL}, BOTH, "has one sequence, the model two"),
        ({"objective": Objective.CLASSIFY}, DECODER, "needs labelled"),
        ({}, replace(DECODER, tokenizer_digest="sha256:1"), "of another tokenizer than the model"),
        ({"objective": Objective.SPANS, "decoder_seq": 2}, BOTH, "no row of the corpus fits"),
    ],
)
def test_what_does_not_suit_the_model_is_rejected(texts, options, model, what):
    with pytest.raises(InputError, match=what):
        opened(texts, model, **options)
