"""Neurons in the order of a reference: the order is found, the function stays, bad input."""

import json
import shutil
from hashlib import sha256
from itertools import permutations
from pathlib import Path

import moecc_check
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moecc.cli.main import main
from moecc.errors import InputError, MachineError
from moecc.ir import clone
from moecc.jobs.convert import plan, write
from moecc.model.open import add_branches, open_model
from moecc.rewrite.passes import Context, Statistics
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support import extras
from moecc.weights.fits import matched_order

SOURCE = Path(__file__).parents[1] / "golden" / "llama_gqa"
KNOWN = Context(models=("a",))
ALIGN = Pipeline.parse("align-neurons{to=a}")


def tensors(folder):
    return dict(load_file(folder / "model.safetensors"))


@pytest.fixture
def shuffled(tmp_path):
    """The source with its neurons in another order in each block, and a little noise."""
    shutil.copytree(SOURCE, tmp_path / "shuffled")
    rng = np.random.default_rng(0)
    orders = {f"layers.{layer}.": rng.permutation(24) for layer in range(3)}
    stored = tensors(SOURCE)
    for name in [name for name in stored if ".mlp." in name]:
        order = next(order for layer, order in orders.items() if layer in name)
        moved = np.take(stored[name], order, axis=int(name.endswith("down_proj.weight")))
        stored[name] = moved + rng.normal(0, 0.01, moved.shape).astype(np.float32)
    save_file(stored, tmp_path / "shuffled" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "shuffled"


def planned(reference):
    model = open_model(str(SOURCE))
    add_branches(model, {"a": str(reference)})
    return plan(model, ALIGN, "llama")


def test_the_checker_accepts_one_order_for_all_weights_of_a_block(tmp_path):
    words = ["-p", "align-neurons{to=a}", "--experts", f"a={SOURCE}", "--to", "llama"]
    proof = tmp_path / "proof.json"
    code = main(["convert", str(SOURCE), str(tmp_path / "out"), *words, "--proof", str(proof)])
    assert code == 0
    texts = [(tmp_path / f"proof.{name}.moe").read_text() for name in ("before", "after")]
    log = json.loads(proof.read_text())
    assert moecc_check.accepted(log, *texts)
    reference = 'source("a:model.layers.1.mlp.up_proj.weight"'
    texts[1] = texts[1].replace(reference, reference.replace("1", "2"), 1)
    log["after"] = sha256(texts[1].encode()).hexdigest()
    with pytest.raises(moecc_check.Rejected):
        moecc_check.accepted(log, *texts)


def test_the_order_is_found_and_the_function_is_proved(shuffled, tmp_path):
    done = planned(shuffled)
    assert done.proof is not None
    write(done, tmp_path / "out")
    done.checkpoint.close()
    before, reference, aligned = tensors(SOURCE), tensors(shuffled), tensors(tmp_path / "out")
    for name, array in aligned.items():
        assert np.abs(array - reference[name]).max() < 0.06
        if ".mlp." in name:
            at = int(name.endswith("down_proj.weight"))
            rows = {row.tobytes() for row in np.moveaxis(before[name], at, 0)}
            assert {row.tobytes() for row in np.moveaxis(array, at, 0)} == rows
        else:
            assert np.array_equal(array, before[name])


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_no_other_order_has_a_larger_sum(seed, neurons):
    scores = np.random.default_rng(seed).normal(size=(neurons, neurons))
    order = matched_order(scores)
    assert sorted(order.tolist()) == list(range(neurons))
    places = np.arange(neurons)
    best = max(scores[places, list(other)].sum() for other in permutations(range(neurons)))
    assert np.isclose(scores[places, order].sum(), best)


def test_weights_that_are_not_finite(shuffled, tmp_path):
    stored = tensors(shuffled)
    stored["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    save_file(stored, shuffled / "model.safetensors", metadata={"format": "pt"})
    done = planned(shuffled)
    with pytest.raises(InputError, match="not finite"):
        write(done, tmp_path / "out")
    done.checkpoint.close()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("passes", "context", "message"),
    [
        ("align-neurons{to=b}", KNOWN, "no model of this name"),
        (
            "align-neurons{to=a}",
            Context(models=("a",), statistics=Statistics(("t",))),
            "number the",
        ),
        (
            "upcycle,align-neurons{to=a}",
            Context(models=("a",)),
            "nothing to work on|matched nothing",
        ),
    ],
)
def test_what_cannot_be_aligned(passes, context, message):
    with open_model(str(SOURCE)) as model, pytest.raises(InputError, match=message):
        run_pipeline(clone(model.graph), Pipeline.parse(passes), context=context)


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with open_model(str(SOURCE)) as model, pytest.raises(MachineError, match="needs scipy"):
        run_pipeline(model.graph, ALIGN, context=KNOWN)
