"""Arrays that no device can hold, and processes that are gone: errors of the machine."""

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from moecc_backends.xla.program import machine_errors

from moecc.backend import get_backend
from moecc.errors import MachineError
from moecc.ir import F32, parse

SIZE = 1 << 22
"""Of both axes of a table of rows that are looked up: 70 TB, from two arrays of 17 MB."""

GRAPH = parse(
    f"""
moecc 1
graph wide {{
  input %tokens : i32[batch=B]
  param %table : f32[vocab=1, embed={SIZE}] = source("table" : f32[vocab=1, embed={SIZE}])
  %rows = embedding %table, %tokens {{axis=vocab}} : f32[batch=B, embed={SIZE}]
  output rows = %rows
}}
"""
)
PARAMS = {"table": np.ones((1, SIZE), np.float32)}
INPUTS = {"tokens": np.zeros(SIZE, np.int32)}

TOO_SMALL = "memory of a device is too small"


def test_a_program():
    with pytest.raises(MachineError, match=TOO_SMALL) as error:
        get_backend("xla").compile(GRAPH).run(PARAMS, INPUTS)
    assert error.value.problems[0].found == f"Out of memory allocating {4 * SIZE**2} bytes."


def test_a_session():
    with pytest.raises(MachineError, match=TOO_SMALL):
        get_backend("xla").session(PARAMS, dtype=F32).run(GRAPH, INPUTS)


def test_other_errors_of_xla_stay_what_they_are():
    with pytest.raises(JaxRuntimeError, match="INTERNAL"), machine_errors():
        raise JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(MachineError, match=TOO_SMALL), machine_errors():
        raise JaxRuntimeError("RESOURCE_EXHAUSTED")


def test_a_process_that_is_gone(monkeypatch):
    lost = "UNKNOWN: Gloo all-reduce failed: Connection reset by peer"
    with pytest.raises(JaxRuntimeError), machine_errors():
        raise JaxRuntimeError(lost)
    for name, value in (("COORDINATOR", "localhost:9"), ("PROCESSES", "2"), ("PROCESS", "0")):
        monkeypatch.setenv(f"MOECC_{name}", value)
    with pytest.raises(MachineError, match="another process of this run is gone"), machine_errors():
        raise JaxRuntimeError(lost)
