"""``pack-segments``: a document of a packed row has the results that it has alone."""

import numpy as np
import pytest
from moecc_passes.training import PackSegmentsPass

from moecc.errors import InputError
from moecc.ir.structure import index_bound
from moecc.testing.data import params_for
from moecc.train.batches import BatchShape, collate
from moecc.train.objectives import RowSegment

from .dense_blocks import applied, relative, run
from .model_graphs import GOLDEN as GOLDEN
from .model_graphs import apply_passes, imported

DOCUMENTS = [[5, 3], [8], [2, 1, 4]]
"""The lengths of the documents of each row; a row has 10 tokens."""

DECODER_DOCUMENTS = [[2, 4], [3], [1, 3, 2]]


def packed(graph):
    return applied(PackSegmentsPass(), graph)[0]


def documents(graph):
    """Return random documents of each row."""
    rng = np.random.default_rng(0)
    vocab = index_bound(graph.inputs["tokens"])

    def ids(size):
        return rng.integers(1, vocab, size).astype(np.int32)

    none = np.zeros(0, np.int32)
    if "decoder_tokens" not in graph.inputs:
        return [[RowSegment(ids(n), none) for n in row] for row in DOCUMENTS]
    both = zip(DOCUMENTS, DECODER_DOCUMENTS, strict=True)
    return [[RowSegment(ids(n), none, ids(m)) for n, m in zip(*row, strict=True)] for row in both]


def batch_of(rows, graph):
    """Return the inputs of a packed graph for rows of documents."""
    shape = BatchShape(3, 10, 7 * ("decoder_tokens" in graph.inputs), tuple(graph.inputs), 0)
    batch = collate(rows, shape)
    return {name: batch[name] for name in graph.inputs}


def compare(graph):
    """Return how far the results of packed documents are from those alone, relatively."""
    after = packed(graph)
    rows = documents(graph)
    params = params_for(graph, 1)
    batch = batch_of(rows, after)
    (found,) = run(after, params, batch).values()
    last = "decoder_segments" if "decoder_segments" in batch else "segments"
    apart, scale = 0.0, 0.0
    for row, segments in enumerate(rows):
        for number, segment in enumerate(segments, 1):
            inputs = {"tokens": segment.tokens[None]}
            if segment.decoder_tokens is not None:
                inputs["decoder_tokens"] = segment.decoder_tokens[None]
            (alone,) = run(graph, params, inputs).values()
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
    batch = batch_of(documents(graph), graph)
    found = run(graph, params_for(graph, 1), batch)
    slots = [a for n, a in found.items() if n.endswith("slots")]
    assert slots
    for array in slots:
        assert ((array >= 0).all(-1) == (batch["segments"] > 0)).all()


@pytest.mark.parametrize(
    ("name", "passes", "message"),
    [
        ("llama_dynamic", "", "dynamic depends on the longest document"),
        ("bert_gelu", "upcycle{experts=2 routing=soft}", "experts read averages of tokens"),
        ("lfm2_square", "", "documents meet in|not in a document"),
        ("qwen3_next_square", "", "documents meet in|not in a document"),
        ("gpt_oss_square_v4", "", "documents meet in|not in a document"),
        ("llama4_square", "", "documents meet in|not in a document"),
        ("llama_gqa", "pack-segments", "packed already"),
        ("llama_gqa", "roll-layers", "repeats its layers"),
    ],
)
def test_what_mixes_documents_otherwise_is_rejected(name, passes, message):
    graph = imported(name, passes)
    with pytest.raises(InputError, match=message):
        apply_passes(graph, "pack-segments")


def test_one_document_needs_no_positions():
    item = PackSegmentsPass(documents="one")
    for name, passes in (("llama_dynamic", ""), ("bert_gelu", "upcycle{experts=2 routing=soft}")):
        after, _ = applied(item, imported(name, passes))
        assert list(after.inputs) == ["tokens", "segments"]
    graph = imported("bert_gelu")
    after, _ = applied(item, graph)
    tokens = np.array([[3, 1, 4, 0, 0]], np.int32)
    params = params_for(graph, 1)
    (found,) = run(after, params, {"tokens": tokens, "segments": np.minimum(tokens, 1)}).values()
    (alone,) = run(graph, params, {"tokens": tokens[:, :3]}).values()
    assert relative(found[:, :3], alone) < 1e-12
