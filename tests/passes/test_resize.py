"""More experts, fewer, merged ones, one dense block: what stays the same function, and what not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from moecc_passes.resized_layer import shared_out
from safetensors.numpy import load_file, save_file
from tiers import few

from moecc.analysis import find_ffn_blocks
from moecc.backend import get_backend
from moecc.errors import InputError, UsageError
from moecc.jobs.convert import plan, write
from moecc.model.open import add_branches, open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.types import F64
from moecc.weights.evaluate import evaluate

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = 1e-12

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
        tokens = {"tokens": np.load(GOLDEN / source / "tokens.npy")}

        def logits():
            program = get_backend("reference").compile(model.graph)
            return program.run(model.params(dtype=F64), tokens)["logits"]

        before = logits()
        done = run_pipeline(model.graph, Pipeline.parse(passes), context=Context())
        error = np.abs(logits() - before).max() / np.abs(before).max()
    return done.preserves.kind, float(error)


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
    family = source.partition("_")[0]
    steps = (
        (GOLDEN / source, mixture, "upcycle{experts=4 router-std=1},grow"),
        (tmp_path / "sparse", family, "merge,to-dense{experts=1}"),
    )
    for place, target, passes in steps:
        with open_model(str(place)) as model:
            write(plan(model, Pipeline.parse(passes), target), tmp_path / _name(target, family))
    before, after = (
        {n: a for f in folder.glob("*.safetensors") for n, a in load_file(f).items()}
        for folder in (GOLDEN / source, tmp_path / "dense")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.fixture
def branch(tmp_path):
    """A mixtral like that of the golden files, with other weights."""
    shutil.copytree(GOLDEN / "mixtral_gqa", tmp_path / "branch")
    file = tmp_path / "branch" / "model.safetensors"
    save_file({name: a + a.dtype.type(1) for name, a in load_file(file).items()}, file)
    return tmp_path / "branch"


def test_an_appended_expert_of_another_model_is_proved_to_change_nothing(branch):
    with open_model(str(GOLDEN / "mixtral_gqa")) as model:
        add_branches(model, {"a": str(branch)})
        passes = Pipeline.parse("append-expert{source=a source-expert=3}")
        planned = plan(model, passes, "st_moe")
        assert planned.proof is not None
        name = "model.layers.1.block_sparse_moe.experts.w3.weight"
        (tensor,) = (t for t in planned.tensors if t.name == name)
        appended = evaluate(tensor.expr, planned.checkpoint.read, F64)[-1]
    stored = load_file(branch / "model.safetensors")
    assert np.array_equal(appended, stored["model.layers.1.block_sparse_moe.experts.3.w3.weight"])


def test_an_exchanged_expert_goes_back(branch, tmp_path):
    """One expert and its row of the router become the other model's; then all is as it was."""
    source = GOLDEN / "mixtral_gqa"
    stored = load_file(source / "model.safetensors")
    there = "exchange-expert{expert=1 source=a source-expert=3}"
    back = "exchange-expert{expert=1 source=b}"
    steps = ((source, "a", branch, there, "there"), (tmp_path / "there", "b", source, back, "back"))
    for folder, name, other, passes, out in steps:
        with open_model(str(folder)) as model:
            add_branches(model, {name: str(other)})
            write(plan(model, Pipeline.parse(passes), "mixtral"), tmp_path / out)
    for name, array in load_file(tmp_path / "there" / "model.safetensors").items():
        if ".experts.1." in name:
            assert np.array_equal(array, stored[name.replace(".1.w", ".3.w")] + 1)
        elif name.endswith(".gate.weight"):
            assert np.array_equal(array[1], stored[name][3] + 1)
            assert np.array_equal(array[[0, 2, 3]], stored[name][[0, 2, 3]])
        else:
            assert np.array_equal(array, stored[name])
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(np.array_equal(again[name], array) for name, array in stored.items())


def test_an_expert_of_the_same_weights_changes_nothing():
    assert changed("mixtral_gqa", "exchange-expert{expert=1}") == ("exact", 0.0)


def test_a_budget_goes_to_the_layers_whose_experts_share_the_work():
    even, uneven = np.array([5.0, 5, 5, 5]), np.array([1.0, 98, 1, 0])
    assert shared_out([even, uneven], [1, 1], 4) == (3, 1)
    assert shared_out([even, even], [2, 2], 5) == (3, 2)
    assert shared_out([even, np.zeros(4)], [2, 2], 8) == (4, 4)


def _name(target, family):
    return "dense" if target == family else "sparse"


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
    with (
        open_model(str(GOLDEN / source)) as model,
        pytest.raises(InputError, match=message),
    ):
        run_pipeline(model.graph, Pipeline.parse(passes), context=Context())


DENSE_AGAIN = (
    ("llama_gqa", "mistral"), ("t5_gated_untied", "t5"), ("gpt2_plain", "gpt2"),
    ("gpt_neox_parallel", "gpt_neox"), ("vit_plain", "vit"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "target", "how"),
    few([(*pair, how) for how in ("concat", "mean") for pair in DENSE_AGAIN], 5),
)
def test_what_was_made_sparse_and_dense_again_is_of_a_dense_family(case, target, how, tmp_path):
    times = 4 if how == "concat" else 1
    text = f"upcycle{{experts=4}},to-dense{{how={how}}}"
    with open_model(str(GOLDEN / case)) as model:
        (width,) = {block.width for block in find_ffn_blocks(model.graph).blocks}
        write(plan(model, Pipeline.parse(text), target), tmp_path / "out")
    with open_model(str(tmp_path / "out")) as written:
        assert {b.width for b in find_ffn_blocks(written.graph).blocks} == {times * width}


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
    with open_model(str(GOLDEN / source)) as model:
        promise = run_pipeline(model.graph, Pipeline.parse(passes), context=Context()).preserves
    assert promise.kind == "reassociation"
    assert promise.up_to.startswith(bound)
    assert promise.is_equality == (not bound)


def test_a_model_of_another_family_is_a_gpt_oss_up_to_its_sinks():
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        planned = plan(model, Pipeline.parse("upcycle{experts=4}"), "gpt_oss")
    assert planned.preserves.up_to.startswith("1e-3908 of each result of attention")
    assert planned.proof is None


@pytest.mark.parametrize(
    ("options", "up_to"),
    [("gates=sigmoid-renormalised", "a factor s / (s + 1e-06)"), ("gates=sigmoid", "")],
)
def test_an_lfm2_is_an_lfm2_moe_up_to_the_floor_of_its_gates(options, up_to):
    with open_model(str(GOLDEN / "lfm2_biases")) as model:
        passes = f"upcycle{{experts=4 router-init=zero {options}}}"
        planned = plan(model, Pipeline.parse(passes), "lfm2_moe")
    assert planned.preserves.up_to.startswith(up_to)
    assert planned.preserves.is_equality == (not up_to)
