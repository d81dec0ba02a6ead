"""Batches: what is in them, the same on any hosts and in any process, what is rejected."""

from dataclasses import replace

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.train.batches import open_batches
from moecc.train.recipe import Corpus, DataSection, Objective
from moecc.train.rows import ModelFacts
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.encoders import ByteEncoder

from .tiny import restored, tokenize, write_lines

EOS, PAD = 256, 257
SENTINELS = ByteEncoder.special.sentinels
PACKED = ("tokens", "segments", "positions", "mask")
DECODER = ModelFacts("decoder", 384, PACKED)
BOTH = ModelFacts("both", 384, (*PACKED, *(f"decoder_{n}" for n in PACKED)), decoder_start=0)


def write(place, *records, kind="documents"):
    source = write_lines(place.with_suffix(".jsonl"), *records)
    tokenize(place, source, format=DocumentFormat(kind), deduplicate=False)
    return str(place)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng, letters = np.random.default_rng(0), list("abcdefgh ")
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
    documents = []
    arrays = zip(*(batch[f"{prefix}{name}"] for name in PACKED), strict=True)
    for row, (tokens, numbers, positions, mask) in enumerate(arrays):
        assert (mask == (numbers > 0)).all()
        assert (tokens[~mask] == PAD).all()
        assert (np.diff(numbers[mask]) >= 0).all()
        for number in range(1, numbers.max(initial=0) + 1):
            here = numbers == number
            assert positions[here].tolist() == list(range(here.sum()))
            documents.append((row, number, tokens[here].tolist()))
    return documents


def targets_of(batch, row, number, prefix=""):
    """Return the targets of a document of a batch."""
    return batch["targets"][row][batch[f"{prefix}segments"][row] == number]


def bytes_of(ids):
    return bytes(np.asarray(ids, np.uint8))


def text_of(folder):
    """Return all text of a token folder."""
    return bytes_of(folder.ids(0, folder.facts.tokens))


def asked(prompt):
    """Return the number that the last question of a prompt is about."""
    return int(prompt.rpartition("what is ")[2].removesuffix("?"))


def test_a_stream_has_every_token_once_and_predicts_the_next(texts):
    batches = opened(texts)
    folder = batches.folders["train/t"]
    rows = batches.rows["t"]
    assert rows == -(-(folder.facts.tokens + 60) // 64)
    counted = predicted = 0
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
    text = text_of(batches.folders["train/t"])
    seen = 0
    assert batches.shape.decoder_seq == batches.batch(0)["decoder_tokens"].shape[1]
    for number in range(6):
        batch = batches.batch(number)
        encoders, decoders = segments(batch), segments(batch, "decoder_")
        assert [e[:2] for e in encoders] == [d[:2] for d in decoders]
        for (row, n, encoder), (_, _, decoder) in zip(encoders, decoders, strict=True):
            targets = targets_of(batch, row, n, "decoder_")
            assert decoder == [0, *targets[:-1].tolist()]
            assert targets[-1] == encoder[-1] == EOS
            ids = restored(np.array(encoder), targets, SENTINELS, EOS)
            assert bytes_of(ids) in text
            seen += len(ids)
        assert (batch["targets"][batch["decoder_segments"] == 0] == -1).all()
    assert seen > 6 * 4 * 48 * (0.5 if packing else 0.3)


def test_masked_rows_predict_what_is_hidden(texts):
    batches = opened(texts, objective=Objective.MASKED)
    text = text_of(batches.folders["train/t"])
    hidden = total = 0
    for number in range(6):
        batch = batches.batch(number)
        for row, n, tokens in segments(batch):
            aims = targets_of(batch, row, n)
            assert bytes_of(np.where(aims >= 0, aims, tokens)) in text
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
            aims = targets_of(batch, row, n)
            assert aims[-1] == EOS
            answer = bytes_of(aims[aims >= 0][:-1]).decode()
            text = bytes_of(tokens).decode()
            assert text.endswith(answer)
            root = asked(text.removesuffix(answer))
            assert int(answer) == root**2
            seen.add(root)
    assert len(seen) > 30


def test_completions_of_an_encoder_decoder(examples):
    batches = opened(examples, BOTH, objective=Objective.COMPLETION)
    assert batches.shape.decoder_seq == len(" 1521") + 1
    batch = batches.batch(0)
    pairs = zip(segments(batch), segments(batch, "decoder_"), strict=True)
    for (row, n, prompt), (_, _, decoder) in pairs:
        aims = targets_of(batch, row, n, "decoder_").tolist()
        assert prompt[-1] == aims[-1] == EOS
        assert decoder == [0, *aims[:-1]]
        assert int(bytes(aims[:-1])) == asked(bytes(prompt[:-1]).decode()) ** 2


def test_long_examples_are_cut_and_reported(tmp_path):
    records = [
        {"prompt": "p" * 50 + "q", "completion": "right"},
        {"prompt": "", "completion": "z" * 90},
    ]
    place = write(tmp_path / "e", *records, kind="examples")
    batches = opened(place, objective=Objective.COMPLETION, seq=16, batch=2, evaluate=())
    batch = batches.batch(0)
    texts = sorted(bytes(t for t in tokens if t < 256) for _, _, tokens in segments(batch))
    # Of 17 tokens that are seen or predicted, the end is only predicted.
    assert texts == [b"p" * 10 + b"qright", b"z" * 16]
    # Without anything before it, all of a completion is predicted but its first token.
    aims = sorted(bytes(t for t in row if 0 <= t < 256) for row in batch["targets"])
    assert aims == [b"right", b"z" * 16]
    assert batches.remarks == ("e: 2 examples are cut, as they are longer than a sequence",)


def test_a_corpus_may_be_called_order(tmp_path):
    """The digest of the order of rows is none of a folder's."""
    first, second = (
        open_batches(DataSection((Corpus(place, name="order"),), seq=8), DECODER).digests
        for place in (write(tmp_path / part, {"text": part * 9}) for part in "ab")
    )
    assert first["order"] == second["order"]
    assert first["train/order"] != second["train/order"]


def test_sequences_beyond_the_stated_context_are_remarked(texts):
    """Learned positions refuse them; rotary ones go on."""
    stated = replace(DECODER, context=64)
    assert opened(texts, stated).remarks == ()
    (remark,) = opened(texts, stated, seq=65).remarks
    assert remark.startswith("decoder: sequences of up to 65 tokens are longer than the context")


def test_examples_that_are_read_as_texts_are_remarked(texts, examples):
    assert opened(examples, objective=Objective.COMPLETION, evaluate=()).remarks == ()
    (remark,) = opened(examples, evaluate=(Corpus(texts),)).remarks
    assert remark.startswith("e: the objective causal reads examples as texts")


def test_spans_that_are_rounded_are_reported(tmp_path):
    """Five letters hide 1 token, not 0.75; 400 need 20 spans of 3, and 101 sentinels are enough."""
    short, long = (write(tmp_path / n, {"text": n * size}) for n, size in (("s", 5), ("l", 400)))
    options = {"objective": Objective.SPANS, "seq": 512, "evaluate": ()}
    assert opened(long, BOTH, **options).remarks == ()
    assert opened(short, BOTH, **options).remarks == (
        "s: noise_density is 0.2 in whole tokens and spans, not 0.15",
        "s: mean_span is 1 in whole tokens and spans, not 3",
    )


@pytest.mark.parametrize(
    ("model", "objective"), [(DECODER, Objective.CAUSAL), (BOTH, Objective.SPANS)]
)
def test_hosts_together_have_the_batch_of_one(texts, model, objective):
    batches = opened(texts, model, batch=8, objective=objective)
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
    assert one.batch(one.batches - 1)["tokens"].shape == (4, 64)
    assert opened(texts, evaluate_batches=2).evaluations["t"].batches == 2


def test_all_misfits_come_at_once(texts, examples, tmp_path):
    data = DataSection((Corpus(texts), Corpus(examples)), objective=Objective.COMPLETION)
    small = replace(DECODER, vocab=100, longest=64)
    with pytest.raises(InputError) as caught:
        open_batches(data, small)
    expected = (
        "longer than the model has positions for",
        "ids beyond the vocabulary",
        "--kind examples, or --kind chat",
        "ids beyond the vocabulary",
        "special tokens of the objective completion are beyond the vocabulary",
    )
    for problem, words in zip(caught.value.problems, expected, strict=True):
        assert words in str(problem)
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
