"""Copies that are made to differ: what is drawn, how much of it, and that the bytes are fixed."""

from fractions import Fraction
from itertools import combinations
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .dense_blocks import Dense, Tensors, upcycled

PREFIX = "layers.0"
MATRICES = {"gate": 1, "up": 1, "down": 2}
"""The position of the axis of neurons in the experts' matrices, ``[expert, …]``."""


def made(dense, seed=0, **options):
    """Return the dense tensors and the parameters after a conversion."""
    graph = dense.graph()
    tensors = Tensors(graph)
    after, _ = upcycled(graph, seed, **options)
    return tensors.arrays, tensors.params(after)


def changed_neurons(copies, params, name):
    """Return ``[expert, mlp]``: whether all weights, or none, of a neuron are drawn anew."""
    differs = copies != params[name]
    others = tuple(i for i in range(1, differs.ndim) if i != MATRICES.get(name.split(".")[2], 1))
    some, every = differs.any(others), differs.all(others)
    np.testing.assert_array_equal(some, every)
    return np.asarray(every)


@given(
    ratio=st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.999, 1.0]) | st.floats(0, 1),
    mlp=st.sampled_from([4, 8, 10, 30, 100]),
    gated=st.booleans(),
    slices=st.sampled_from([1, 2]),
    seed=st.integers(0, 3),
)
def test_drop_draws_the_same_neurons_of_all_matrices(ratio, mlp, gated, slices, seed):
    dense = Dense(embed=4, mlp=mlp, gated=gated, bias_in=True, bias_out=True)
    options = {"experts": 4, "granularity": slices}
    _, copies = made(dense, seed, **options)
    _, params = made(dense, seed, **options, init="drop", drop_ratio=ratio)
    count = floor(Fraction(repr(ratio)) * (mlp // slices))
    names = ["up", "down", *(["gate"] if gated else [])]
    # A single bias that is replaced has no spread, so it is drawn as it was.
    names += [f"{n}.bias" for n in names if n != "down" and count > 1]
    found = [changed_neurons(copies[f"{PREFIX}.{n}"], params, f"{PREFIX}.{n}") for n in names]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    np.testing.assert_array_equal(found[0].sum(1), count)
    np.testing.assert_array_equal(params[f"{PREFIX}.down.bias"], copies[f"{PREFIX}.down.bias"])


@pytest.mark.parametrize("relative_std", [True, False])
@pytest.mark.parametrize("slices", [1, 2])
def test_noise_has_its_mean_and_std_and_is_each_expert_s_own(relative_std, slices):
    dense = Dense(embed=48, mlp=96, bias_in=True)
    kind = "relative" if relative_std else "absolute"
    options = {"experts": 4, "granularity": slices, "top_k": 2}
    arrays, copies = made(dense, **options)
    _, params = made(dense, **options, init="noise", noise_std=0.2, noise=kind)
    for name in ("gate", "up", "down"):
        noise = params[f"{PREFIX}.{name}"] - copies[f"{PREFIX}.{name}"]
        # The factor G of a virtual group stands outside: noise is in units of the dense tensor.
        noise /= slices if name == "down" else 1
        std = 0.2 * arrays[f"{PREFIX}.{name}"].std() if relative_std else 0.2
        for expert in noise:
            assert abs(expert.mean()) < 4 * std / expert.size**0.5
            assert abs(expert.std() / std - 1) < 4 / (2 * expert.size) ** 0.5
        for a, b in combinations(noise.reshape(4, -1), 2):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / a.size**0.5
    up, gate = (params[f"{PREFIX}.{n}"] - copies[f"{PREFIX}.{n}"] for n in ("up", "gate"))
    assert abs(np.corrcoef(up.ravel(), gate.ravel())[0, 1]) < 5 / up.size**0.5


RANDOM = [
    {"init": "noise", "noise_std": 0.1, "noise": "absolute", "granularity": 2},
    {"init": "drop", "drop_ratio": 0.5},
    {"init": "drop", "drop_ratio": 0.5, "granularity": 2, "shared": 0.5},
    {"init": "copy", "router_init": "uniform"},
]


@pytest.mark.parametrize("options", RANDOM)
def test_the_seed_fixes_the_bytes_and_another_seed_changes_them(options):
    dense = Dense(layers=2)
    _, first = made(dense, 1, **options)
    _, again = made(dense, 1, **options)
    _, other = made(dense, 2, **options)
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in again.items()}
    drawn = [n for n in first if "router" in n or ("init" in options and options["init"] != "copy")]
    for name in drawn:
        if "shared" not in name:
            assert (first[name] != other[name]).any(), name


@pytest.mark.parametrize(
    ("init", "std", "largest"),
    [
        ("normal", 0.02, 0.1),
        ("truncated-normal", 0.02, 0.06),
        ("uniform", 0.02, 0.02 * 3**0.5),
        ("logit-std", 0.02 * 8, 0.1),
        ("zero", 0.0, 0.0),
    ],
)
def test_a_router_has_the_std_that_is_asked_for(init, std, largest):
    _, params = made(Dense(embed=64), experts=128, router_init=init, router_std=std)
    router = params["layers.0.ffn.router.weight"]
    assert router.shape == (128, 64)
    expected = 0.0 if init == "zero" else 0.02
    # Three standard deviations are cut off, which takes 1.3 % of it.
    assert router.std() == pytest.approx(expected, rel=0.03)
    assert np.abs(router).max() <= largest
