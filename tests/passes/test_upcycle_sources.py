"""Experts of several models: which tensor comes from which, and when the function is one's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moecc.backend import get_backend
from moecc.errors import InputError, UsageError
from moecc.jobs.convert import plan, write
from moecc.model.open import add_branches, open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.types import F64
from moecc.weights.evaluate import evaluate

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCE = GOLDEN / "llama_gqa"
MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}


def model_like(folder, seed, changes=None):
    """Write a model of the architecture of `SOURCE` with other weights."""
    shutil.copytree(SOURCE, folder)
    rng = np.random.default_rng(seed)
    drawn = {n: (a + rng.normal(size=a.shape)).astype(a.dtype) for n, a in tensors(SOURCE).items()}
    if changes is not None:
        drawn = {name: changes(name, array) for name, array in drawn.items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors(folder):
    return dict(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: model_like(folder / name, ord(name)) for name in "ab"}


def planned(models, options):
    model = open_model(str(SOURCE))
    named = options.partition("sources=")[2].partition(" ")[0].split(",")
    add_branches(model, {name: str(path) for name, path in models.items() if name in named})
    return plan(model, Pipeline.parse(f"upcycle{{{options}}}"), "mixtral", check=False)


@given(
    st.lists(st.sampled_from(["base", "a", "b"]), min_size=2, max_size=4),
    st.sampled_from(["base", "mean"]),
)
@settings(max_examples=10)
def test_each_expert_is_its_models_and_the_rest_is_the_mean(models, names, rest):
    done = planned(models, f"experts={len(names)} sources={','.join(names)} rest={rest}")
    read = {"base": tensors(SOURCE)} | {name: tensors(path) for name, path in models.items()}
    counted = names if rest == "mean" else ["base"]
    for tensor in done.tensors:
        found = evaluate(tensor.expr, done.model.checkpoint.read, F64)
        layer, _, own = tensor.name.partition(".block_sparse_moe.experts.")
        if own:
            number, word, _ = own.split(".")
            name = f"{layer}.mlp.{MATRICES[word]}_proj.weight"
            assert np.array_equal(found, read[names[int(number)]][name])
        elif not tensor.name.endswith("gate.weight"):
            mean = np.mean([read[name][tensor.name].astype(float) for name in counted], axis=0)
            np.testing.assert_allclose(found, mean, rtol=3e-7, atol=3e-7)
    done.model.checkpoint.close()


def logits(place):
    with open_model(str(place)) as model:
        program = get_backend("reference").compile(model.graph)
        tokens = np.load(SOURCE / "tokens.npy")
        return program.run(model.params(dtype=F64), {"tokens": tokens})["logits"]


def test_where_the_experts_of_one_model_are_chosen_it_is_computed(tmp_path):
    """With a router of zeros a token goes to the first experts, all of which are one model's."""
    base = tensors(SOURCE)
    other = model_like(tmp_path / "a", 1, lambda n, a: a if ".mlp." in n else base[n])
    done = planned({"a": other}, "experts=4 top-k=2 router-init=zero sources=a,a,base,base")
    assert "experts come from several models: a, base" in str(done.preserves)
    write(done, tmp_path / "out")
    expected = logits(other)
    assert np.abs(logits(tmp_path / "out") - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.abs(logits(SOURCE) - expected).max() > 0.1 * np.abs(expected).max()
    assert (tmp_path / "out" / "README.md").read_text().count("--experts a=A") == 1
    files = json.loads((tmp_path / "out" / "moecc_manifest.json").read_text())["source_files"]
    assert {"model.safetensors", "a/model.safetensors"} <= files.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("experts=2 sources=base,a,b", "every copy comes from one model"),
        ("experts=2 sources=base,a init=noise", "not made to differ"),
        ("experts=2 rest=mean", "nothing to take a mean of"),
    ],
)
def test_options_that_contradict_each_other(models, options, message):
    with pytest.raises(UsageError, match=message):
        planned(models, options)


def test_models_that_do_not_suit(tmp_path):
    """All problems of all models at once."""
    narrow = model_like(tmp_path / "narrow", 2)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with open_model(str(SOURCE)) as model, pytest.raises(InputError) as raised:
        add_branches(
            model,
            {"a": str(narrow), "b": str(GOLDEN / "qwen2_square"), "c": str(tmp_path / "none")},
        )
    text = str(raised.value)
    assert "rms_norm_eps: the models differ in their architecture" in text
    assert "the models are of different families" in text
    assert "none" in text
