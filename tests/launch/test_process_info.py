"""The environment says which process this one is, all of it or nothing."""

import pytest

from moecc.errors import UsageError
from moecc.launch.processes import ProcessInfo, cluster_process, process_info

WHOLE = {"MOECC_COORDINATOR": "127.0.0.1:8476", "MOECC_PROCESSES": "4", "MOECC_PROCESS": "3"}


def test_a_place_is_read_as_it_is_written():
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
def test_what_is_no_place_is_told(change, says):
    with pytest.raises(UsageError, match=says):
        process_info({**WHOLE, **change})


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[003-004,9],login", "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
GKE = {
    "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "w-0.run,w-1.run",
    "MEGASCALE_COORDINATOR_ADDRESS": "s-0.run:8080", "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "process", "local"),
    [
        (SLURM, ProcessInfo("gpu003:49159", 8, 5), 1),
        ({**SLURM, "SLURM_STEP_NODELIST": "a,b"}, ProcessInfo("a:49159", 8, 5), 1),
        ({**SLURM, "JAX_COORDINATOR_PORT": "99"}, ProcessInfo("gpu003:99", 8, 5), 1),
        (OPEN_MPI, ProcessInfo("10.96.0.1:62624", 2, 1), 0),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9,::1]:43"},
         ProcessInfo("[fe80::b9]:49153", 2, 1), 0),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "", "JAX_COORDINATOR_ADDRESS": "h:1"},
         ProcessInfo("h:1", 2, 1), 0),
        (GKE, ProcessInfo("s-0.run:8476", 4, 3), None),
    ],
)  # fmt: skip
def test_schedulers_state_each_process(variables, process, local):
    assert cluster_process(variables) == (process, local)
    incomplete = {n: v for n, v in variables.items() if not n.endswith(("SIZE", "HOSTNAMES"))}
    if "SLURM_NTASKS" not in variables:
        with pytest.raises(UsageError, match="the variables of the cluster are incomplete"):
            cluster_process(incomplete)
    assert cluster_process({"HOME": "/"}) is None
