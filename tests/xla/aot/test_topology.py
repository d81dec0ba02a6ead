"""What has to be there, and set, to compile for a machine."""

from __future__ import annotations

import importlib.util

import pytest
from moecc_backends.xla import ahead as topology
from moecc_backends.xla.ahead import require

from moecc.errors import MachineError
from moecc.plan.machines import parse_machine


@pytest.mark.parametrize(
    ("machine", "package"), [("tpu:v5p:2x2x1", "libtpu"), ("gpu:h100:8", "jax_plugins")]
)
def test_a_missing_extra_is_named_in_one_line(machine, package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        topology, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(MachineError, match=r"pip install 'jax\[") as caught:
        require(parse_machine(machine))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (65.21G) exceeds available HBM (15.25G).",
            65.21, 15.25,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.40G of 15.25G hbm. "
            "Exceeded hbm capacity by 4.15G.",
            19.4, 15.25,
        ),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_a_program_too_large(message, needed, available):
    pytest.importorskip("jax")
    from moecc_backends.xla.ahead import CompilerFailed, DoesNotFit, refusal

    error = refusal(RuntimeError(message))
    assert isinstance(error, DoesNotFit)
    assert error.needed_bytes == int(needed * 2**30)
    assert error.available_bytes == int(available * 2**30)
    rejection = refusal(RuntimeError("INTERNAL: something else"))
    assert isinstance(rejection, CompilerFailed)
    assert rejection.problems[0].found == "INTERNAL: something else"
