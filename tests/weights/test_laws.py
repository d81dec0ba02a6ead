"""Laws of the ways to upcycle that change weights, as their papers state them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from moecc.types import BF16, F32, PRED, Axis, TensorType, tensor
from moecc.weights.arithmetic import Add, Moment, Mul, Select
from moecc.weights.draws import Normal, Subset, derive_key
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Tile
from moecc.weights.simplify import simplify

EXPERTS, MLP, EMBED = 8, 96, 64
MATRICES = {
    "gate": Source("gate", tensor(BF16, mlp=MLP, embed=EMBED)),
    "up": Source("up", tensor(BF16, mlp=MLP, embed=EMBED)),
    "down": Source("down", tensor(BF16, embed=EMBED, mlp=MLP)),
}
KINDS: tuple[Literal["mean", "std"], ...] = ("mean", "std")


def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(len(name))
    values = rng.normal(0.01, 0.05, MATRICES[name].type.shape).astype(np.float32)
    return values.astype(BF16.numpy)[start:stop]


def drop_set(count: int) -> Expr:
    type = TensorType(PRED, (Axis("expert", EXPERTS), Axis("mlp", MLP)))
    return Subset(type, "mlp", count, derive_key(0, "layers.0.ffn/drop"))


def dropped(name: str, count: int) -> Expr:
    """Drop-Upcycling (Nakamura et al., 2502.19261): redraw `count` neurons of every expert."""
    experts = Tile(MATRICES[name], "expert", EXPERTS)
    chosen = drop_set(count)
    fresh = Normal(experts.type.with_dtype(F32), 1.0, derive_key(0, name))
    mean, std = (Moment(kind, experts, chosen, ("expert",)) for kind in KINDS)
    return Select(chosen, Add(Mul(fresh, std), mean), experts)


def neurons_first(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(np.float64) if name != "down" else values.swapaxes(-1, -2).astype(float)


@pytest.mark.parametrize("name", MATRICES)
def test_dropping_nothing_is_copying(name: str) -> None:
    made = evaluate(dropped(name, 0), read, BF16)
    assert all(part.tobytes() == read(name).tobytes() for part in made)


@pytest.mark.parametrize("count", [1, 48, 96])
def test_the_same_neurons_are_drawn_anew_in_the_three_matrices(count: int) -> None:
    sets = []
    for name in MATRICES:
        made = neurons_first(name, evaluate(dropped(name, count), read, F32))
        differs = made != neurons_first(name, read(name))
        # A neuron differs in every entry or in none.
        assert (differs.any(axis=-1) == differs.all(axis=-1)).all()
        sets.append(differs.any(axis=-1))
    assert (sets[0].sum(axis=-1) == count).all()
    assert (sets[0] == sets[1]).all()
    assert (sets[0] == sets[2]).all()
    assert (sets[0] == evaluate(drop_set(count), read)).all()


@pytest.mark.parametrize("name", MATRICES)
def test_new_entries_have_the_moments_of_what_they_replace(name: str) -> None:
    made = neurons_first(name, evaluate(dropped(name, 48), read, F32))
    dense = neurons_first(name, read(name))
    chosen = evaluate(drop_set(48), read)
    for expert in range(EXPERTS):
        old, new = dense[chosen[expert]], made[expert][chosen[expert]]
        # Three standard errors; the matrices are fixed, and so are the keys.
        assert abs(new.mean() - old.mean()) < 3 * old.std() / old.size**0.5
        assert abs(new.std() / old.std() - 1) < 3 / (2 * old.size) ** 0.5


def test_experts_overlap_as_independent_sets_do() -> None:
    chosen = evaluate(drop_set(48), read)
    kept = [np.flatnonzero(~row) for row in chosen]
    shared = [len(np.intersect1d(a, b)) for i, a in enumerate(kept) for b in kept[:i]]
    # E = (1 - r)^2 F; hypergeometric variance for each pair.
    variance = 48 * 0.5 * 0.5 * (MLP - 48) / (MLP - 1)
    assert abs(np.mean(shared) - 0.25 * MLP) < 3 * (variance / len(shared)) ** 0.5


def test_an_expert_alone_is_that_expert() -> None:
    whole = evaluate(dropped("up", 48), read, BF16)
    for expert in (0, 5):
        one = simplify(Index(dropped("up", 48), "expert", expert))
        assert "tile" not in str(one)
        assert evaluate(one, read, BF16).tobytes() == whole[expert].tobytes()
        rows = [evaluate(one, read, BF16, (i, i + 7)) for i in range(0, 91, 7)]
        assert np.concatenate(rows).tobytes() == whole[expert][:91].tobytes()


def noisy(std: float, relative: bool) -> Expr:
    experts = Tile(MATRICES["up"], "expert", EXPERTS)
    noise: Expr = Normal(experts.type.with_dtype(F32), std, derive_key(0, "noise"))
    return Add(experts, Mul(noise, Moment("std", MATRICES["up"])) if relative else noise)


@pytest.mark.parametrize("relative", [False, True])
def test_noise_has_its_size_and_no_mean(relative: bool) -> None:
    dense = read("up").astype(np.float64)
    made = evaluate(noisy(0.01, relative), read, F32).astype(np.float64)
    noise = made - dense
    unit = 0.01 * (dense.std() if relative else 1.0)
    assert abs(noise.mean()) < 4 * unit / noise.size**0.5
    assert abs(noise.std() / unit - 1) < 4 / (2 * noise.size) ** 0.5
    # Each expert has noise of its own.
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 4 / noise[0].size ** 0.5


@pytest.mark.parametrize("relative", [False, True])
def test_no_noise_is_copying(relative: bool) -> None:
    made = evaluate(noisy(0.0, relative), read, BF16)
    assert all(part.tobytes() == read("up").tobytes() for part in made)
