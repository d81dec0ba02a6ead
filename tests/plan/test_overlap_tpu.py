"""Which collectives of a layer that gathers tokens are beside products on a TPU."""

import pytest

from moecc.plan.collectives import Collective, Kernel, PartCost, WeightProduct
from moecc.plan.machines import efficiency
from moecc.plan.schedule import shares_on_tpu

SIZES = {"query": 3.0, "output": 3.0, "router": 1.0, "up": 9.0, "down": 9.0}
"""The bytes of each parameter."""


def moved(op, size, times, why, **more):
    """Return a collective on links of which a plan counts on a byte a second."""
    each = size / efficiency("network")
    return Collective(
        op, (), size, why, tensor_bytes=size, times=times, seconds=times * each, **more
    )


def of_parameters(names):
    for name in names:
        yield moved("all_gather", SIZES[name], 2, "parameters", weight=name)
        yield moved("reduce_scatter", SIZES[name], 1, "gradients", weight=name)


def part(names, products, tokens=0.0):
    ring = (
        moved("all_gather", tokens, 2, "tokens"),
        moved("all_gather", tokens, 1, "tokens", leaves_work=True),
        moved("reduce_scatter", tokens, 2, "sums", leaves_work=True),
    )
    collectives = (*of_parameters(names), *(ring if tokens else ()))
    return PartCost(
        "layers.part", 1, 0.0, 0.0, 0.0, 0.0, 0.0, collectives, products=lambda: products
    )


def layer(tokens, experts):
    kernel = Kernel(in_rounds=False, experts=experts)
    attention = [WeightProduct("query", 9.0, True), WeightProduct("output", 9.0, False)]
    ffn = [WeightProduct("router", 1.0, True)]
    ffn += [WeightProduct(name, 9.0, False, kernel) for name in ("up", "down")]
    names = [p.weight for p in ffn]
    return [part(["query", "output"], attention), part(names, ffn, tokens)]


def shares(parts, op):
    """Return for each parameter, or for what else is moved, the shares beside products."""
    found = {}
    for one, beside in zip(parts, shares_on_tpu(parts), strict=True):
        for transfer, share in zip(one.collectives, beside, strict=True):
            if transfer.op == op:
                found.setdefault(transfer.weight or transfer.why, []).append(share)
    return found


def exposed(parts, op):
    return {name for name, each in shares(parts, op).items() if 0.0 in each}


def test_gradients_of_experts_are_reduced_before_sums_that_take_longer():
    # Those of attention wait for the sums, and are the last; experts' have the router's product.
    found = exposed(layer(tokens=10.0, experts=1), "reduce_scatter")
    assert found == {"down", "router"}


def test_gradients_of_experts_are_the_last_if_they_take_longer_than_sums_and_attentions():
    # Then the product of the layer's input is theirs, and attention's have those of each other.
    found = exposed(layer(tokens=5.0, experts=1), "reduce_scatter")
    assert found == {"down", "query"}


@pytest.mark.parametrize("tokens", [5.0, 10.0])
def test_gradients_of_several_experts_have_the_loops_of_each_other(tokens):
    assert exposed(layer(tokens, experts=2), "reduce_scatter") == set()


def test_parameters_are_copied_before_tokens_that_take_longer_are_gathered():
    of = shares(layer(tokens=10.0, experts=1), "all_gather")
    # Forward, `up` ends the gather of `down`; again, attention's products are the experts' and the
    # gradients'.
    assert of["down"] == [0.5]
    assert of["up"] == [1.0]
    assert of["query"] == [0.0]
    assert of["output"] == [0.5]
    assert of["tokens"] == [0.0, 1.0]


def test_kernels_end_gathers_of_parameters_that_take_longer_than_tokens():
    of = shares(layer(tokens=5.0, experts=1), "all_gather")
    assert of["down"] == [0.0]
    assert of["up"] == [1.0]
    assert of["query"] == [0.0]
    assert of["output"] == [0.5]


def test_the_last_parameter_is_waited_for_where_nothing_is_computed_again():
    # As XLA schedules llama-3.1-8b for 16 v5p: of a turn forward the first, backward the last.
    dense = [WeightProduct(name, 9.0, name == "query") for name in ("query", "output", "down")]
    (of,) = shares_on_tpu([part([p.weight for p in dense], dense)], recomputes=False)
    gathers = dict(zip(("query", "output", "down"), of[::2], strict=True))
    assert gathers == {"query": 0.5, "output": 1.0, "down": 0.5}


def test_what_a_layer_does_not_begin_with_backward_is_waited_for():
    parts = layer(tokens=10.0, experts=1)
    assert shares(list(reversed(parts)), "all_gather")["tokens"] == [0.0, 0.0]
