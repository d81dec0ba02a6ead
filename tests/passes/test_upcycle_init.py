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
MATRICES = [f"{PREFIX}.{name}" for name in ("gate", "up", "down")]


def made(dense, seed=0, **options):
    """Return the dense tensors and the parameters after a conversion."""
    graph = dense.graph()
    tensors = Tensors(graph)
    after, _ = upcycled(graph, seed, **options)
    return tensors.arrays, tensors.params(after)


def changed_neurons(copies, params, name):
    """Return ``[expert, mlp]``: whether all weights, or none, of a neuron are drawn anew."""
    differs = copies[f"{PREFIX}.{name}"] != params[f"{PREFIX}.{name}"]
    neurons = 2 if name == "down" else 1
    weights = tuple(axis for axis in range(1, differs.ndim) if axis != neurons)
    every = differs.all(weights)
    np.testing.assert_array_equal(differs.any(weights), every)
    return every


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
    names = ["up", "gate"] if gated else ["up"]
    # A single bias that is replaced has no spread, so it is drawn as it was.
    names = ["down", *names, *(f"{name}.bias" for name in names if count > 1)]
    changed, *others = (changed_neurons(copies, params, name) for name in names)
    for other in others:
        np.testing.assert_array_equal(changed, other)
    np.testing.assert_array_equal(changed.sum(1), count)
    np.testing.assert_array_equal(params[f"{PREFIX}.down.bias"], copies[f"{PREFIX}.down.bias"])


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("slices", [1, 2])
def test_noise_has_its_mean_and_std_and_is_each_expert_s_own(kind, slices):
    dense = Dense(embed=48, mlp=96, bias_in=True)
    options = {"experts": 4, "granularity": slices, "top_k": 2}
    arrays, copies = made(dense, **options)
    _, params = made(dense, **options, init="noise", noise_std=0.2, noise=kind)
    gate, up, down = (params[name] - copies[name] for name in MATRICES)
    # The factor G of a virtual group stands outside: noise is in units of the dense tensor.
    for name, noise in zip(MATRICES, (gate, up, down / slices), strict=True):
        std = 0.2 * (arrays[name].std() if kind == "relative" else 1)
        for expert in noise:
            assert abs(expert.mean()) < 4 * std / expert.size**0.5
            assert abs(expert.std() / std - 1) < 4 / (2 * expert.size) ** 0.5
        for pair in combinations(noise, 2):
            assert_independent(*pair)
    assert_independent(up, gate)


def assert_independent(first, second):
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / first.size**0.5


RANDOM = [
    {"init": "noise", "noise_std": 0.1, "noise": "absolute", "granularity": 2},
    {"init": "drop", "drop_ratio": 0.5},
    {"init": "drop", "drop_ratio": 0.5, "granularity": 2, "shared": 0.5},
    {"init": "copy", "router_init": "uniform"},
]


@pytest.mark.parametrize("options", RANDOM)
def test_the_seed_fixes_the_bytes_and_another_seed_changes_them(options):
    dense = Dense(layers=2)
    first, again, other = (made(dense, seed, **options)[1] for seed in (1, 1, 2))
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in again.items()}
    for name in first:
        if "router" in name or (options["init"] != "copy" and "shared" not in name):
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
    router = params[f"{PREFIX}.ffn.router.weight"]
    assert router.shape == (128, 64)
    # Three standard deviations are cut off, which takes 1.3 % of it.
    assert router.std() == pytest.approx(0.0 if init == "zero" else 0.02, rel=0.03)
    assert np.abs(router).max() <= largest
