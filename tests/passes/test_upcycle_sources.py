"""Experts of several models: which tensor comes from which, and when the function is one's."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moecc.errors import InputError, UsageError
from moecc.jobs.convert import write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.types import F64
from moecc.weights.evaluate import evaluate

from .dense_blocks import relative
from .model_graphs import GOLDEN, logits, planned, tensors

SOURCE = GOLDEN / "llama_gqa"
MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}


def model_like(folder, seed, part=""):
    """Write a model of the architecture of `SOURCE` with other weights, where names have `part`."""
    shutil.copytree(SOURCE, folder)
    rng = np.random.default_rng(seed)
    stored = {
        name: (array + rng.normal(size=array.shape) * (part in name)).astype(array.dtype)
        for name, array in tensors(SOURCE).items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: model_like(folder / name, ord(name)) for name in "ab"}


@given(
    st.lists(st.sampled_from(["base", "a", "b"]), min_size=2, max_size=4),
    st.sampled_from(["base", "mean"]),
)
@settings(max_examples=10)
def test_each_expert_is_its_models_and_the_rest_is_the_mean(models, names, rest):
    passes = f"upcycle{{experts={len(names)} sources={','.join(names)} rest={rest}}}"
    branches = {name: path for name, path in models.items() if name in names}
    conversion = planned(SOURCE, passes, "mixtral", branches=branches, check=False)
    read = {"base": tensors(SOURCE)} | {name: tensors(path) for name, path in models.items()}
    counted = names if rest == "mean" else ["base"]
    for tensor in conversion.tensors:
        found = evaluate(tensor.expr, conversion.checkpoint.read, F64)
        layer, _, own = tensor.name.partition(".block_sparse_moe.experts.")
        if own:
            number, word, _ = own.split(".")
            name = f"{layer}.mlp.{MATRICES[word]}_proj.weight"
            assert np.array_equal(found, read[names[int(number)]][name])
        elif not tensor.name.endswith("gate.weight"):
            mean = np.mean([read[name][tensor.name].astype(float) for name in counted], axis=0)
            np.testing.assert_allclose(found, mean, rtol=3e-7, atol=3e-7)


def test_where_the_experts_of_one_model_are_chosen_it_is_computed(tmp_path):
    """With a router of zeros a token goes to the first experts, all of which are one model's."""
    other, out = model_like(tmp_path / "a", 1, ".mlp."), tmp_path / "out"
    passes = "upcycle{experts=4 top-k=2 router-init=zero sources=a,a,base,base}"
    conversion = planned(SOURCE, passes, "mixtral", branches={"a": other}, check=False)
    assert "experts come from several models: a, base" in str(conversion.preserves)
    write(conversion, out)
    expected, found, base = (
        logits(open_model(str(folder)), "llama_gqa") for folder in (other, out, SOURCE)
    )
    assert relative(found, expected) <= 1e-6
    assert relative(base, expected) > 0.1
    assert (out / "README.md").read_text().count("--experts a=A") == 1
    files = json.loads((out / "moecc_manifest.json").read_text())["source_files"]
    assert {"model.safetensors", "a/model.safetensors"} <= files.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("experts=2 sources=base,a,b", "every copy comes from one model(?s:.*)hint: experts=3$"),
        ("experts=4 sources=base,a", "hint: experts=2, or sources=base,a,base,a$"),
        ("experts=2 sources=base,a init=noise", "not made to differ"),
        ("experts=2 rest=mean", "nothing to take a mean of(?s:.*)hint: sources=base,a names"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(f"upcycle{{{options}}}")


def test_models_that_do_not_suit(tmp_path):
    """All problems of all models at once."""
    narrow = model_like(tmp_path / "narrow", 2)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    branches = {"a": narrow, "b": GOLDEN / "qwen2_square", "c": tmp_path / "none"}
    with pytest.raises(InputError) as raised:
        planned(SOURCE, "upcycle", "mixtral", branches=branches)
    text = str(raised.value)
    assert "rms_norm_eps: the models differ in their architecture" in text
    assert "the models are of different families" in text
    assert "none" in text
