"""Neurons in the order of a reference: the order is found, the function stays, bad input."""

import json
import shutil
from hashlib import sha256
from itertools import permutations

import moecc_check
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moecc.cli.main import main
from moecc.errors import InputError, MachineError
from moecc.jobs.convert import write
from moecc.rewrite.passes import Statistics
from moecc.support import extras
from moecc.weights.fits import matched_order

from .model_graphs import GOLDEN, apply_passes, imported, planned, tensors

SOURCE = GOLDEN / "llama_gqa"
ALIGN = "align-neurons{to=a}"


def write_tensors(folder, stored):
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def shuffled(tmp_path):
    """The source with its neurons in another order in each block, and a little noise."""
    folder = shutil.copytree(SOURCE, tmp_path / "shuffled")
    rng = np.random.default_rng(0)
    orders = [rng.permutation(24) for _ in range(3)]
    stored = tensors(SOURCE)
    for name in [name for name in stored if ".mlp." in name]:
        order = orders[int(name.split(".")[2])]
        moved = np.take(stored[name], order, axis=neurons_of(name))
        stored[name] = moved + rng.normal(0, 0.01, moved.shape).astype(np.float32)
    write_tensors(folder, stored)
    return folder


def neurons_of(name):
    """Return which axis of a tensor of a block is that of the neurons."""
    return int(name.endswith("down_proj.weight"))


def test_the_checker_accepts_one_order_for_all_weights_of_a_block(tmp_path):
    proof = tmp_path / "proof.json"
    words = ["-p", ALIGN, "--experts", f"a={SOURCE}", "--to", "llama", "--proof", str(proof)]
    assert main(["convert", str(SOURCE), str(tmp_path / "out"), *words]) == 0
    texts = [(tmp_path / f"proof.{name}.moe").read_text() for name in ("before", "after")]
    log = json.loads(proof.read_text())
    assert moecc_check.accepted(log, *texts)
    reference = 'source("a:model.layers.1.mlp.up_proj.weight"'
    texts[1] = texts[1].replace(reference, reference.replace("1", "2"), 1)
    log["after"] = sha256(texts[1].encode()).hexdigest()
    with pytest.raises(moecc_check.Rejected):
        moecc_check.accepted(log, *texts)


def test_the_order_is_found_and_the_function_is_proved(shuffled, tmp_path):
    conversion = planned(SOURCE, ALIGN, "llama", branches={"a": shuffled})
    assert conversion.proof is not None
    write(conversion, tmp_path / "out")
    before, reference, aligned = tensors(SOURCE), tensors(shuffled), tensors(tmp_path / "out")
    for name, array in aligned.items():
        assert np.abs(array - reference[name]).max() < 0.06
        if ".mlp." in name:
            rows, aligned_rows = (
                sorted(row.tobytes() for row in np.moveaxis(stored, neurons_of(name), 0))
                for stored in (before[name], array)
            )
            assert aligned_rows == rows
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
    write_tensors(shuffled, stored)
    conversion = planned(SOURCE, ALIGN, "llama", branches={"a": shuffled})
    with pytest.raises(InputError, match="not finite"):
        write(conversion, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("passes", "context", "message"),
    [
        ("align-neurons{to=b}", {}, "no model of this name"),
        (ALIGN, {"statistics": Statistics(("t",))}, "number the"),
        (f"upcycle,{ALIGN}", {}, "nothing to work on|matched nothing"),
    ],
)
def test_what_cannot_be_aligned(passes, context, message):
    with pytest.raises(InputError, match=message):
        apply_passes(imported("llama_gqa"), passes, models=("a",), **context)


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs scipy"):
        apply_passes(imported("llama_gqa"), ALIGN, models=("a",))
