"""The environment says which process this one is, all of it or nothing."""

from __future__ import annotations

import pytest

from moecc.errors import UsageError
from moecc.launch.processes import ProcessInfo, process_info

WHOLE = {
    "MOECC_COORDINATOR": "127.0.0.1:8476",
    "MOECC_PROCESSES": "4",
    "MOECC_PROCESS": "3",
}


def test_a_place_is_read_as_it_is_written() -> None:
    process = ProcessInfo("127.0.0.1:8476", 4, 3)
    assert process_info(WHOLE) == process
    assert process.environment() == WHOLE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MOECC_PROCESS": ""}, "expected: MOECC_PROCESS"),
        ({"MOECC_COORDINATOR": "localhost"}, "not an address"),
        ({"MOECC_COORDINATOR": "localhost:99999"}, "not an address"),
        ({"MOECC_PROCESSES": "0"}, "not a number of processes"),
        ({"MOECC_PROCESSES": "many"}, "not a number of processes"),
        ({"MOECC_PROCESS": "4"}, "0 to 3"),
        ({"MOECC_PROCESS": "-1"}, "0 to 3"),
        ({"MOECC_DISTRIBUTED": "yes"}, "cluster, or off"),
    ],
)
def test_what_is_no_place_is_told(change: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        process_info({**WHOLE, **change})
    assert says in str(error.value)
