"""Names of machines, and what is said of those that are not known."""

from __future__ import annotations

import importlib.util

import pytest
from moecc_backends.xla.aot import topology
from moecc_backends.xla.aot.gpus import GPUS, description
from moecc_backends.xla.aot.topology import TPUS, Target, parse_target, prepare, require

from moecc.errors import MachineError, UsageError


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("tpu:v4:8x8x8", Target("tpu", "v4", "8x8x8", 1024)),
        ("tpu:v5p:4x4x4", Target("tpu", "v5p", "4x4x4", 64)),
        ("tpu:v6e:2x4", Target("tpu", "v6e", "2x4", 8)),
        ("tpu:tpu7x:2x2x1", Target("tpu", "tpu7x", "2x2x1", 8)),
        ("gpu:h100:8", Target("gpu", "h100", "", 8)),
        ("cpu:8", Target("cpu", "", "", 8)),
        ("cpu", Target("cpu", "", "", 1)),
    ],
)
def test_machines_by_name(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    "text",
    ["tpu:v9:2x2", "tpu", "gpu:h900:8", "tpu:v5p:axb", "tpu:v5p:", "cpu:0", "gpu:h100:x", ""],
)
def test_an_unknown_machine_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    (problem,) = caught.value.problems
    assert problem.expected
    assert "tpu:" in problem.expected


def test_a_slip_of_the_pen_is_corrected() -> None:
    with pytest.raises(UsageError, match="did you mean 'tpu:v5p'"):
        parse_target("tpu:v5q:2x2x1")


def test_every_generation_says_its_devices() -> None:
    assert {chip: parse_target(f"tpu:{chip}:2x2").devices for chip in TPUS} == {
        "v4": 8, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "package"), [("tpu:v5p:2x2x1", "libtpu"), ("gpu:h100:8", "jax_plugins")]
)
def test_a_missing_extra_is_named_in_one_line(
    machine: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        topology, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(MachineError, match=r"pip install 'moecc\[") as caught:
        require(parse_target(machine))
    assert "\n" not in str(caught.value)


def test_the_environment_asks_for_as_many_cpu_devices() -> None:
    environment = {"XLA_FLAGS": "--xla_dump_to=x"}
    prepare(parse_target("cpu:4"), environment)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["XLA_FLAGS"].split() == [
        "--xla_dump_to=x", "--xla_force_host_platform_device_count=4",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", GPUS)
def test_a_gpu_is_described_with_its_memory(kind: str) -> None:
    assert f"device_memory_size: {GPUS[kind].memory_bytes}\n" in description(kind)
    assert parse_target(f"gpu:{kind}:8").gpu_bytes == GPUS[kind].memory_bytes
