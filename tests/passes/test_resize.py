"""More experts, fewer, merged ones, one dense block: what stays the same function, and what not."""

import shutil

import numpy as np
import pytest
from moecc_passes.resized_layer import shared_out
from safetensors.numpy import save_file
from tiers import few

from moecc.analysis import find_ffn_blocks
from moecc.errors import InputError, UsageError
from moecc.jobs.convert import write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.types import F64
from moecc.weights.evaluate import evaluate

from .dense_blocks import EXACT, relative
from .model_graphs import GOLDEN, apply_passes, imported, logits, planned, tensors

SAME = [
    ("mixtral_gqa", "grow{times=3},merge{size=3}"),
    ("ernie4_5_moe_range", "grow{times=2},merge{size=2}"),
    ("gpt_oss_square_v4", "grow{times=2}"),
    ("llama4_square", "grow"),
    ("qwen2_moe_plain", "grow{chosen=same}"),
    ("glm4_moe_plain_v4", "grow{chosen=same}"),
    ("phimoe_window", "grow{chosen=same}"),
    ("mixtral_gqa", "zero-experts{count=3 bias=logits}"),
    ("gpt_oss_square_v4", "grow{chosen=same bias=choice}"),
    ("qwen2_moe_plain", "zero-experts"),
    ("phimoe_window", "zero-experts{count=2}"),
    ("llama_biases_head_dim", "upcycle{experts=4 router-std=1},zero-experts,grow"),
    ("mixtral_gqa", "append-expert{source-expert=2}"),
    ("qwen2_moe_plain", "append-expert{count=3}"),
    ("glm4_moe_plain_v4", "append-expert{source-expert=1}"),
    ("llama_gqa", "upcycle{experts=4 gates=sigmoid router-init=zero},grow"),
    ("llama_biases_head_dim", "upcycle{experts=4 router-std=1},grow,merge,to-dense"),
    ("llama_biases_head_dim", "upcycle{experts=4 router-std=1},to-dense{how=mean}"),
    (
        "llama_biases_head_dim",
        "upcycle{experts=4 granularity=2 router-std=1},to-dense{how=concat experts=0,1}",
    ),
    ("llama_gqa", "upcycle{experts=4 gates=softmax router-init=zero},to-dense{experts=2}"),
]
"""Models, and what leaves their function."""

OTHER = [
    ("mixtral_gqa", "prune{keep=3}", 0.01),
    ("mixtral_gqa", "prune{keep=3,2}", 0.01),
    ("mixtral_gqa", "exchange-expert{expert=1 source-expert=2}", 0.01),
    ("mixtral_gqa", "to-dense", 0.01),
    ("mixtral_gqa", "to-dense{how=mean}", 0.01),
    ("mixtral_gqa", "to-dense{how=concat}", 0.01),
    ("mixtral_gqa", "merge{size=2}", 0.01),
    ("ernie4_5_moe_range", "zero-experts{count=1}", 0.0),
    ("llama_gqa", "upcycle{experts=4 granularity=2 router-std=1},to-dense{how=mean}", 0.01),
]
"""Models, what changes their function, and by how much at least."""


def changed(source, passes):
    """Return what was promised, and max |Δ logit| / max |logit| in float64."""
    with open_model(str(GOLDEN / source)) as model:
        before = logits(model, source)
        report = apply_passes(model.graph, passes)
        return report.preserves.kind, relative(logits(model, source), before)


def check_equal(folder, stored):
    written = tensors(folder)
    assert written.keys() == stored.keys()
    assert [n for n, a in stored.items() if not np.array_equal(a, written[n])] == []


@pytest.mark.parametrize(("source", "passes"), SAME)
def test_the_function_stays(source, passes):
    kind, error = changed(source, passes)
    assert kind == "reassociation"
    assert error <= EXACT


@pytest.mark.parametrize(("source", "passes", "least"), OTHER)
def test_what_is_lost_is_announced(source, passes, least):
    kind, error = changed(source, passes)
    assert kind == "approximate"
    assert error >= least


@pytest.mark.parametrize(
    ("source", "mixture"),
    [("llama_gqa", "mixtral"), ("qwen3_square", "qwen3_moe"), ("olmo2_gqa", "flex_olmo")],
)
def test_a_round_trip_gives_the_very_tensors(source, mixture, tmp_path):
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    write(planned(source, "upcycle{experts=4 router-std=1},grow", mixture), sparse)
    family, _, _ = source.partition("_")
    write(planned(sparse, "merge,to-dense{experts=1}", family), dense)
    check_equal(dense, tensors(GOLDEN / source))


@pytest.fixture
def branch(tmp_path):
    """A mixtral like that of the golden files, with other weights."""
    folder = shutil.copytree(GOLDEN / "mixtral_gqa", tmp_path / "branch")
    moved = {name: array + array.dtype.type(1) for name, array in tensors(folder).items()}
    save_file(moved, folder / "model.safetensors")
    return folder


def test_an_appended_expert_of_another_model_is_proved_to_change_nothing(branch):
    passes = "append-expert{source=a source-expert=3}"
    conversion = planned("mixtral_gqa", passes, "st_moe", branches={"a": branch})
    assert conversion.proof is not None
    experts = "model.layers.1.block_sparse_moe.experts"
    (tensor,) = (t for t in conversion.tensors if t.name == f"{experts}.w3.weight")
    appended = evaluate(tensor.expr, conversion.checkpoint.read, F64)[-1]
    assert np.array_equal(appended, tensors(branch)[f"{experts}.3.w3.weight"])


def test_an_exchanged_expert_goes_back(branch, tmp_path):
    """One expert and its row of the router become the other model's; then all is as it was."""
    source, there, back = GOLDEN / "mixtral_gqa", tmp_path / "there", tmp_path / "back"
    stored = tensors(source)
    passes = "exchange-expert{expert=1 source=a source-expert=3}"
    write(planned(source, passes, "mixtral", branches={"a": branch}), there)
    passes = "exchange-expert{expert=1 source=b}"
    write(planned(there, passes, "mixtral", branches={"b": source}), back)
    for name, array in tensors(there).items():
        if ".experts.1." in name:
            assert np.array_equal(array, stored[name.replace(".1.w", ".3.w")] + 1)
        elif name.endswith(".gate.weight"):
            assert np.array_equal(array[1], stored[name][3] + 1)
            assert np.array_equal(array[[0, 2, 3]], stored[name][[0, 2, 3]])
        else:
            assert np.array_equal(array, stored[name])
    check_equal(back, stored)


def test_an_expert_of_the_same_weights_changes_nothing():
    assert changed("mixtral_gqa", "exchange-expert{expert=1}") == ("exact", 0.0)


def test_a_budget_goes_to_the_layers_whose_experts_share_the_work():
    even, uneven = np.array([5.0, 5, 5, 5]), np.array([1.0, 98, 1, 0])
    assert shared_out([even, uneven], [1, 1], 4) == (3, 1)
    assert shared_out([even, even], [2, 2], 5) == (3, 2)
    assert shared_out([even, np.zeros(4)], [2, 2], 8) == (4, 4)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("grow{times=1}", "at least 2"),
        ("grow{bias=choice}", "no bias is needed"),
        ("zero-experts{count=0}", "at least 1"),
        ("merge{size=1}", "at least 2"),
        ("prune{keep=1}", "too few experts"),
        ("prune{keep=3,1}", "too few experts"),
        ("prune{keep=()}", "too few experts"),
        ("prune{budget=model}", "shared out by statistics"),
        ("prune{keep=3,2 budget=model by=share}", "shared out by statistics"),
        ("append-expert{source-expert=-1}", "at least 0"),
        ("append-expert{by=share source-expert=1}", "among those of the model itself"),
        ("exchange-expert{expert=-1}", "at least 0"),
        ("prune{keep=2 experts=0,x}", "not numbers of experts"),
        ("prune{keep=2 experts=1,0}", "not in ascending order"),
        ("prune{keep=2 experts=1}", "another number of experts is listed"),
        ("to-dense{experts=0,1}", "one expert is kept"),
    ],
)
def test_options_that_make_no_sense(passes, message):
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(passes)


@pytest.mark.parametrize(
    ("source", "passes", "message"),
    [
        ("mixtral_gqa", "merge{size=3}", "do not divide into groups"),
        ("mixtral_gqa", "merge{size=4}", "one expert is no mixture"),
        ("mixtral_gqa", "prune{keep=9}", "cannot keep that many"),
        ("mixtral_gqa", "prune{keep=2 experts=0,9}", "there are no such experts"),
        ("mixtral_gqa", "prune{keep=3,3,3}", "another number of layers is listed"),
        ("mixtral_gqa", "prune{keep=2 budget=model by=share}", "statistics"),
        ("mixtral_gqa", "append-expert{source=a}", "no model of this name"),
        ("mixtral_gqa", "append-expert{by=share}", "statistics"),
        ("mixtral_gqa", "append-expert{source-expert=4}", "there are no such experts"),
        ("mixtral_gqa", "exchange-expert{expert=9}", "there are no such experts"),
        ("mixtral_gqa", "exchange-expert{source=b}", "no model of this name"),
        ("llama_gqa", "upcycle{slots=capacity},append-expert", "a capacity shrinks"),
        ("phimoe_square_v4", "grow", "do not divide among copies"),
        ("llama_gqa", "upcycle{slots=capacity},grow", "copies drop other choices"),
        ("llama_gqa", "upcycle{routing=prototypes},grow", "by a router can be changed"),
        ("llama_gqa", "upcycle{slots=capacity},grow{chosen=same}", "a capacity shrinks"),
        ("llama_gqa", "upcycle{slots=capacity},zero-experts", "a capacity shrinks"),
        ("qwen2_moe_plain", "zero-experts{bias=choice}", "have a share of softmax gates"),
        ("glm4_moe_plain_v4", "zero-experts{bias=logits}", "has a bias of the choice"),
        ("mixtral_gqa", "add-losses,grow", "its routing is read elsewhere"),
        ("lfm2_moe_bias", "grow", "its gates are computed further"),
    ],
)
def test_layers_that_cannot_be_changed(source, passes, message):
    with pytest.raises(InputError, match=message):
        imported(source, passes)


DENSE_AGAIN = (
    ("llama_gqa", "mistral"), ("t5_gated_untied", "t5"), ("gpt2_plain", "gpt2"),
    ("gpt_neox_parallel", "gpt_neox"), ("vit_plain", "vit"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "target", "how"),
    few([(*pair, how) for how in ("concat", "mean") for pair in DENSE_AGAIN], 5),
)
def test_what_was_made_sparse_and_dense_again_is_of_a_dense_family(case, target, how, tmp_path):
    out = tmp_path / "out"
    write(planned(case, f"upcycle{{experts=4}},to-dense{{how={how}}}", target), out)
    before, after = (
        {block.width for block in find_ffn_blocks(imported(model)).blocks} for model in (case, out)
    )
    (width,) = before
    assert after == {width * (4 if how == "concat" else 1)}


@pytest.mark.parametrize(
    ("source", "passes", "bound"),
    [
        # exp(−10⁴) of what experts have that are there, whatever their logits.
        ("qwen2_moe_plain", "grow{chosen=same}", "1e-4342 of each gate"),
        ("qwen2_moe_plain", "zero-experts{count=2}", "1e-4342 of each gate"),
        # Gates of the chosen alone.
        ("gpt_oss_square_v4", "zero-experts", "0 where products of the router are below 2,500"),
        ("glm4_moe_plain_v4", "zero-experts", "0 where biases of the choice are"),
        ("llama_gqa", "upcycle{gates=sigmoid-renormalised},zero-experts", ""),
        ("qwen2_moe_plain", "grow", ""),
    ],
)
def test_a_promise_says_up_to_what_it_holds(source, passes, bound):
    promise = apply_passes(imported(source), passes).preserves
    assert promise.kind == "reassociation"
    assert promise.up_to.startswith(bound)
    assert promise.is_equality == (not bound)


@pytest.mark.parametrize(
    ("source", "passes", "target", "up_to"),
    [
        ("llama_gqa", "upcycle{experts=4}", "gpt_oss", "1e-3908 of each result of attention"),
        ("lfm2_biases", "upcycle{experts=4 router-init=zero gates=sigmoid-renormalised}",
         "lfm2_moe", "a factor s / (s + 1e-06)"),
        ("lfm2_biases", "upcycle{experts=4 router-init=zero gates=sigmoid}", "lfm2_moe", ""),
    ],
    ids=["sinks", "the floor of gates", "gates without a floor"],
)  # fmt: skip
def test_a_model_of_another_family_is_one_up_to_a_bound(source, passes, target, up_to):
    conversion = planned(source, passes, target)
    assert conversion.preserves.up_to.startswith(up_to)
    assert conversion.preserves.is_equality == (not up_to)
    assert (conversion.proof is None) == bool(up_to)
