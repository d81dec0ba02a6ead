"""Layers as a plan reads them, of every family."""

from pathlib import Path

import pytest

from moecc.model.open import open_model
from moecc.plan.workload import make_batch, workload

GOLDEN = Path(__file__).parent.parent / "golden"


def work_of(name):
    with open_model(str(GOLDEN / name)) as model:
        return workload(model.graph, make_batch(model.graph, 1))


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("bert_gelu", {"layers": 2}),
        ("gemma2_caps", {"layers": 4}),
        ("gpt2_plain", {"layers": 3}),
        ("opt_plain", {"layers": 3}),
        ("vit_plain", {"layers": 2}),
        ("whisper_plain", {"encoder.layers": 2, "decoder.layers": 3}),
    ],
)
def test_a_scaled_or_normed_embedding_makes_no_layer_another(name, stacks):
    layers = work_of(name).layers
    assert [(layer.name, layer.count) for layer in layers] == list(stacks.items())
    names = [shape.names for layer in layers for shape in layer.inputs]
    assert names == [("batch", "seq", "embed")] * len(layers)
