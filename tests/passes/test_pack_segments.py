"""``pack-segments``: a document of a packed row has the results that it has alone."""

from pathlib import Path

import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend
from moecc_passes.training import PackSegmentsPass

from moecc.errors import InputError
from moecc.ir import verify
from moecc.ir.structure import clone, index_bound
from moecc.model.open import open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.data import params_for
from moecc.train.batches import BatchShape, collate
from moecc.train.objectives import RowSegment

GOLDEN = Path(__file__).parent.parent / "golden"

DOCUMENTS = [[5, 3], [8], [2, 1, 4]]
"""The lengths of the documents of each row; a row has 10 tokens."""

DECODER_DOCUMENTS = [[2, 4], [3], [1, 3, 2]]


def imported(name, passes="", *, padding=False):
    with open_model(str(GOLDEN / name), padding=padding) as model:
        graph = clone(model.graph)
    if passes:
        run_pipeline(graph, Pipeline.parse(passes))
    return graph


def packed(graph):
    made = clone(graph)
    PackSegmentsPass().apply(made, Context())
    verify(made)
    return made


def documents(graph, seed=0):
    """Return random documents of each row."""
    rng = np.random.default_rng(seed)
    vocab = index_bound(graph.inputs["tokens"])
    assert vocab is not None

    def ids(size):
        return rng.integers(1, vocab, size).astype(np.int32)

    none = np.zeros(0, np.int32)
    if "decoder_tokens" not in graph.inputs:
        return [[RowSegment(ids(n), none) for n in row] for row in DOCUMENTS]
    both = zip(DOCUMENTS, DECODER_DOCUMENTS, strict=True)
    return [[RowSegment(ids(n), none, ids(m)) for n, m in zip(*row, strict=True)] for row in both]


def compare(graph):
    """Return how far the results of packed documents are from those alone, relatively."""
    after = packed(graph)
    rows = documents(graph)
    params = params_for(graph, 1)
    shape = BatchShape(
        len(rows), 10, 7 * ("decoder_tokens" in graph.inputs), tuple(after.inputs), 0
    )
    batch = {n: a for n, a in collate(rows, shape).items() if n in after.inputs}
    backend = ReferenceBackend()
    (found,) = backend.compile(after).run(params, batch).values()
    program = backend.compile(graph)
    last = "decoder_segments" if "decoder_segments" in batch else "segments"
    apart, scale = 0.0, 0.0
    for row, segments in enumerate(rows):
        for number, segment in enumerate(segments, 1):
            inputs = {
                "tokens": segment.tokens[None],
                "mask": np.ones((1, len(segment.tokens)), bool),
            }
            if segment.decoder_tokens is not None:
                inputs["decoder_tokens"] = segment.decoder_tokens[None]
            given = {n: a for n, a in inputs.items() if n in graph.inputs}
            (alone,) = program.run(params, given).values()
            together = found[row][batch[last][row] == number]
            apart = max(apart, float(np.abs(together - alone[0]).max()))
            scale = max(scale, float(np.abs(alone).max()))
    assert np.isfinite(found).all()
    return apart / scale


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("llama_yarn", ""),
        ("mistral_window", ""),
        ("qwen3_moe_plain", ""),
        ("llama_gqa", "upcycle{experts=4 top-k=2 router-std=1.0}"),
        ("llama_gqa", "upcycle{experts=4 routing=prototypes top-k=2 router-std=1.0}"),
        ("bert_gelu", ""),
        ("t5_relu_tied", ""),
        ("t5_gated_untied", "upcycle{experts=4 top-k=2 router-std=1.0}"),
    ],
)
def test_packed_documents_have_the_results_that_they_have_alone(name, passes):
    assert compare(imported(name, passes)) < 1e-12


def test_padding_takes_no_slot():
    graph = packed(imported("llama_gqa", "upcycle{experts=4 top-k=2},trace-routing"))
    rows = documents(graph)
    batch = collate(rows, BatchShape(3, 10, 0, tuple(graph.inputs), 0))
    given = {n: batch[n] for n in graph.inputs}
    found = ReferenceBackend().compile(graph).run(params_for(graph, 1), given)
    slots = [a for n, a in found.items() if n.endswith("slots")]
    assert slots
    for array in slots:
        assert ((array >= 0).all(-1) == (batch["segments"] > 0)).all()


def test_what_mixes_documents_otherwise_is_rejected():
    with pytest.raises(InputError, match="dynamic depends on the longest document"):
        packed(imported("llama_dynamic"))
    with pytest.raises(InputError, match="experts read averages of tokens"):
        packed(imported("bert_gelu", "upcycle{experts=2 routing=soft}"))
    for name in ("lfm2_square", "qwen3_next_square", "gpt_oss_square_v4", "llama4_square"):
        with pytest.raises(InputError, match=r"documents meet in|not in a document"):
            packed(imported(name))
    with pytest.raises(InputError, match="packed already"):
        packed(packed(imported("llama_gqa")))
    with pytest.raises(InputError, match="repeats its layers"):
        run_pipeline(imported("llama_gqa", "roll-layers"), Pipeline.parse("pack-segments"))


def test_one_document_needs_no_positions():
    item = PackSegmentsPass(documents="one")
    for name, passes in (("llama_dynamic", ""), ("bert_gelu", "upcycle{experts=2 routing=soft}")):
        graph = imported(name, passes)
        item.apply(graph, Context())
        verify(graph)
        assert list(graph.inputs) == ["tokens", "segments"]
    graph = imported("bert_gelu")
    after = clone(graph)
    item.apply(after, Context())
    tokens = np.array([[3, 1, 4, 0, 0]], np.int32)
    params, backend = params_for(graph, 1), ReferenceBackend()
    given = {"tokens": tokens, "segments": np.minimum(tokens, 1)}
    (found,) = backend.compile(after).run(params, given).values()
    (alone,) = backend.compile(graph).run(params, {"tokens": tokens[:, :3]}).values()
    assert np.abs(found[:, :3] - alone).max() < 1e-12 * np.abs(alone).max()
