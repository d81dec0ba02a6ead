"""Machines are found by name; what is none is told with the list of those that are."""

import pytest

from moecc.errors import InputError, UsageError
from moecc.plan.machines import parse_machine
from moecc.plan.search import check_devices
from moecc.plan.step import plan_mesh


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("tpu:v4:8x8x8", 1024),
        ("tpu:v5e:16x16", 256),
        ("tpu:v5p:4x4x4", 64),
        ("tpu:tpu7x:2x2x1", 8),
        ("gpu:b200:16", 16),
        ("cpu", 1),
        ("cpu:8", 8),
    ],
)
def test_devices_are_those_of_jax(name, devices):
    assert parse_machine(name).devices == devices


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tpu:v5q:4x4x4", "did you mean 'v5"),
        ("tpu:v5p", "tpu:v4|v5e|v5p|v6e|tpu7x:TOPOLOGY"),
        ("npu:x:1", "gpu:a100|h100|h200|b200:N"),
        ("tpu:v5p:4x4x5", "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4"),
        ("gpu:h100:12", "a multiple of 8"),
        ("gpu:h100:0", "1 to 8"),
        ("cpu:none", "cpu:N"),
        ("", "unknown machine"),
        ("v5e-17", "no TPU v5e has 17 chips"),
        ("tpu:v5p-63", "v5p-32 or v5p-64"),
        ("v5litepod-999", "v5litepod-256"),
        ("a101x8", "did you mean 'a100'"),
    ],
)
def test_unknown_machines_are_told_with_the_list(name, says):
    with pytest.raises(UsageError) as error:
        parse_machine(name)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data", "data:8,model:4"),
        ("date=8", "did you mean 'data'"),
        ("data=8,data=2", "not a mesh"),
        ("data=0", "not a mesh"),
        ("data=8,", "not a mesh"),
    ],
)
def test_what_is_no_mesh_is_told(text, says):
    with pytest.raises(UsageError) as error:
        plan_mesh(text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("v5litepod-16", "tpu:v5e:4x4"),
        ("V6E-8", "tpu:v6e:2x4"),
        ("v4-32", "tpu:v4:2x2x4"),
        ("v5p-128", "tpu:v5p:4x4x4"),
        ("tpu:v5p-128", "tpu:v5p:4x4x4"),
        ("h100x8", "gpu:h100:8"),
        ("16xh200", "gpu:h200:16"),
        ("a100", "gpu:a100:1"),
    ],
)
def test_names_that_clouds_and_people_use(short, name):
    assert parse_machine(short) == parse_machine(name)


def test_a_mesh_of_another_size_says_which_would_fit():
    with pytest.raises(InputError) as error:
        check_devices(plan_mesh("data=8,expert=4"), 64, "tpu:v5p:4x4x4")
    assert "expert=8 would" in str(error.value)
