"""Which gathers and reductions of a turn of a loop over layers find a product on a TPU."""

import pytest

from moecc.plan.collectives import Kernel, WeightProduct
from moecc.plan.schedule import exposed_gathers, exposed_gradients

FIRST = (
    WeightProduct("k", 1.0, True),
    WeightProduct("v", 1.0, True),
    WeightProduct("q", 4.0, True),
)
DENSE = (*FIRST, WeightProduct("o", 4.0, False))
EXPERTS = ("gate", "up", "down")
CAPACITY = (*DENSE, *(WeightProduct(name, 32.0, False) for name in EXPERTS))
NAMES = [p.weight for p in CAPACITY]


def with_kernels(experts=1, *, in_rounds=False):
    kernel = Kernel(in_rounds, experts)
    return (*DENSE, *(WeightProduct(name, 32.0, False, kernel) for name in EXPERTS))


KERNELS, ROUNDS = with_kernels(), with_kernels(in_rounds=True)


def reduced(of_experts):
    """Return the seconds of each reduction, of the longest first."""
    return {**dict.fromkeys(EXPERTS, of_experts), "q": 0.5, "o": 0.5, "k": 0.1, "v": 0.1}


def test_a_gather_takes_the_product_before_the_one_that_reads_it():
    assert exposed_gathers(CAPACITY, NAMES) == {"k"}
    assert exposed_gathers(CAPACITY, EXPERTS) == set(), "what is stored whole has products, too"
    assert exposed_gathers(CAPACITY[4:], EXPERTS) == {"gate"}


def test_rounds_take_no_gather_and_theirs_take_the_products_of_attention():
    assert exposed_gathers(ROUNDS, NAMES) == {"k", "v", "q"}
    assert exposed_gathers(ROUNDS, EXPERTS) == set()
    assert exposed_gathers(ROUNDS[4:], EXPERTS) == set(EXPERTS)


def test_a_kernel_ends_its_own_gather_and_leaves_the_next_one_beside_itself():
    assert exposed_gathers(KERNELS, NAMES) == {"k", "up", "down"}
    assert exposed_gathers(KERNELS, ["down"]) == set(), "no other kernel ends a gather"
    early = exposed_gathers(KERNELS, NAMES, EXPERTS)
    assert early == {"k", "v", "q"}, "what is copied before the kernels ends no gather there"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(4.0, {"down", "q"}), (4.1, {"down", "q"}), (6.5, {"up", "down", "q"})],
)
@pytest.mark.parametrize("products", [KERNELS, ROUNDS, with_kernels(2, in_rounds=True)])
def test_gradients_of_kernels_leave_no_product_to_each_other(products, seconds, expected):
    found = exposed_gradients(products, reduced(seconds), len(FIRST))
    assert found == expected


def test_a_gradient_is_reduced_beside_the_loops_of_several_experts():
    assert exposed_gradients(with_kernels(2), reduced(60.0), len(FIRST)) == set()


def test_what_is_reduced_last_has_the_first_choice_of_products():
    assert exposed_gradients(KERNELS[3:], reduced(4.0), 1) == {"up", "down", "o"}
    last_first = dict(reversed(reduced(4.0).items()))
    assert exposed_gradients(KERNELS[3:], last_first, 1) == {"up", "gate"}
