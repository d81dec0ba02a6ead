"""Layers that add nothing at first: the same bits, the deeper config, what cannot be copied."""

import numpy as np
import pytest

from moecc.errors import InputError, UsageError
from moecc.ir import clone
from moecc.jobs.convert import write
from moecc.model.open import open_model
from moecc.prove import prove
from moecc.rewrite.pipeline import Pipeline
from moecc.types import F64

from .model_graphs import GOLDEN, apply_passes, imported, logits, planned


@pytest.mark.parametrize(
    "source",
    [
        "llama_gqa",  # two sums, one after the other
        "gpt_neox_parallel",  # attention and block are added together
        "gemma2_square",  # norms after the last matrices, windows on some layers
        "olmo2_gqa",  # norms after the last matrices, and none before
        "mixtral_gqa",
        "t5_gated_untied",  # two stacks, and a bias of attention that layers share
    ],
)
def test_the_bits_stay_and_the_prover_agrees(source):
    with open_model(str(GOLDEN / source)) as model:
        before = clone(model.graph)
        apply_passes(model.graph, "canonicalize{exact=true}")
        expected = logits(model, source)
        report = apply_passes(model.graph, "expand-blocks{every=1}")
        assert np.array_equal(logits(model, source), expected)
    assert report.preserves.kind == "exact"
    assert prove(before, model.graph, refute=False).status == "proved"


def test_the_layers_are_numbered_anew(tmp_path):
    source = str(GOLDEN / "gemma2_square")
    conversion = planned(source, "expand-blocks{every=2}", "gemma2")
    assert conversion.proof is not None
    write(conversion, tmp_path / "out")
    with open_model(source) as model, open_model(str(tmp_path / "out")) as deeper:
        config = deeper.graph.attrs["config"]
        assert config["num_hidden_layers"] == 3
        assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
        old, new = model.params(dtype=F64), deeper.params(dtype=F64)
        for name in [n for n in model.graph.params if "layers.1." in n]:
            copy = new[name.replace("layers.1.", "layers.2.")]
            is_last = "post_attention" in name or "post_feedforward" in name
            # Gemma stores the gain of a norm less one.
            assert np.array_equal(copy, np.full_like(copy, -1) if is_last else old[name])


@pytest.mark.parametrize(
    ("source", "passes", "message"),
    [
        ("bert_gelu", "expand-blocks{every=1}", "does not end with a sum"),
        ("llama_gqa", "expand-blocks{every=4}", "no stack has 4 layers"),
        ("mixtral_gqa", "add-losses,expand-blocks{every=1}", "returns more than its stream"),
        ("mixtral_gqa", "specialize{jitter=0.1},expand-blocks{every=1}", "draws random numbers"),
        ("ernie4_5_moe_every_second", "expand-blocks{every=1}", "no config of the deeper model"),
    ],
)
def test_layers_that_cannot_be_inserted(source, passes, message):
    with pytest.raises(InputError, match=message):
        imported(source, passes)


def test_a_distance_of_no_layers():
    with pytest.raises(UsageError, match="at least 1"):
        Pipeline.parse("expand-blocks{every=0}")
