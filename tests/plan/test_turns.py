"""Which gathers and reductions of a turn of a loop over layers find a product on a TPU."""

from __future__ import annotations

import pytest

from moecc.plan.turns import Product, exposed_gathers, exposed_gradients

FIRST = (Product("k", 1.0, True), Product("v", 1.0, True), Product("q", 4.0, True))
DENSE = (*FIRST, Product("o", 4.0, False))
EXPERTS = ("gate", "up", "down")
CAPACITY = (*DENSE, *(Product(name, 32.0, False) for name in EXPERTS))
KERNELS = (*DENSE, *(Product(name, 32.0, False, True) for name in EXPERTS))
NAMES = [p.weight for p in CAPACITY]


def reduced(of_experts: float) -> dict[str, float]:
    """Return the seconds of each reduction."""
    return {"k": 0.1, "v": 0.1, "q": 0.5, "o": 0.5, **dict.fromkeys(EXPERTS, of_experts)}


def test_a_gather_takes_the_product_before_the_one_that_reads_it() -> None:
    assert exposed_gathers(CAPACITY, NAMES) == {"k"}
    assert exposed_gathers(CAPACITY, EXPERTS) == set(), "what is stored whole has products, too"
    assert exposed_gathers(CAPACITY[4:], EXPERTS) == {"gate"}


def test_kernels_take_no_gather_and_theirs_take_the_products_of_attention() -> None:
    assert exposed_gathers(KERNELS, NAMES) == {"k", "v", "q"}
    assert exposed_gathers(KERNELS, EXPERTS) == set()
    assert exposed_gathers(KERNELS[4:], EXPERTS) == set(EXPERTS)


@pytest.mark.parametrize("seconds", [4.0, 60.0])
def test_a_gradient_is_reduced_beside_those_of_other_weights(seconds: float) -> None:
    assert exposed_gradients(CAPACITY, reduced(seconds), len(FIRST)) == set()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(4.0, {"down", "q"}), (4.1, {"down", "q"}), (6.5, {"up", "down", "q"})],
)
def test_gradients_of_kernels_leave_no_product_to_each_other(
    seconds: float, expected: set[str]
) -> None:
    found = exposed_gradients(KERNELS, reduced(seconds), len(FIRST))
    assert found == expected
