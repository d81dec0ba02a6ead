"""Several slices of TPUs: the same within one, and the data center's network between them."""

import pytest

from moecc.errors import UsageError
from moecc.plan.explore import part_of_machine
from moecc.plan.machines import parse_machine, sizes_of_kind
from moecc.plan.networks import HOP_SECONDS, Slices

ONE, TWO = parse_machine("tpu:v5p:2x2x4"), parse_machine("tpu:v5p:2x2x4:2")
OUTER = 6.25e9
BYTES = 1e9


def test_two_slices_are_twice_the_devices_of_one():
    assert (ONE.devices, TWO.devices) == (16, 32)
    assert parse_machine("tpu:v5p:2x2x4:1") == ONE
    assert TWO.usable_bytes == ONE.usable_bytes
    # The two devices of a chip of v4 share its link to other slices.
    network = parse_machine("tpu:v4:2x2x1:2").network
    assert isinstance(network, Slices)
    assert network.outer_bytes_per_second == OUTER / 2
    assert [m.devices for m in sizes_of_kind(TWO)][:3] == [16, 32, 64]
    assert part_of_machine(TWO, 2).name == "tpu:v5p:2x2x4"


def test_an_axis_within_a_slice_takes_the_time_of_one_slice():
    alone, both = ONE.network.routes({"fsdp": 16}), TWO.network.routes({"data": 2, "fsdp": 16})
    inner = both["fsdp",]
    assert inner.all_gather(BYTES) == alone["fsdp",].all_gather(BYTES)
    assert inner.all_to_all(BYTES) == alone["fsdp",].all_to_all(BYTES)


def test_a_group_across_slices_takes_the_time_of_the_slower_level():
    route, alone = TWO.network.routes({"fsdp": 32})["fsdp",], ONE.network.routes({"fsdp": 16})
    # Sixteen devices together fetch the half that their slice has not.
    outside, inside = BYTES / 2 / (16 * OUTER), alone["fsdp",].all_gather(BYTES)
    assert route.all_gather(BYTES) == pytest.approx(max(outside, inside) + HOP_SECONDS)
    # Half of the rows of a device go to the other slice.
    outside, inside = BYTES / 2 / OUTER, alone["fsdp",].all_to_all(BYTES / 2)
    assert outside > inside
    assert route.all_to_all(BYTES) == pytest.approx(outside + HOP_SECONDS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tpu:v5p:2x2x4:0", "not a number of slices"),
        ("tpu:v5p:2x2x4:99", "1 to 64"),
        ("tpu:v5p:2x2x5:2", "no topology"),
        ("tpu:v5q:2x2x4:2", "did you mean"),
    ],
)
def test_what_are_no_slices(name, says):
    with pytest.raises(UsageError, match=says):
        parse_machine(name)
