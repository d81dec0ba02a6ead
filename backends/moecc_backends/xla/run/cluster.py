"""The cluster that JAX detects: its first process and the number of this one.

JAX detects clusters within ``jax.distributed.initialize`` and connects at once, and a client whose
peer never comes ends its process with SIGABRT.  Detected before, a cluster is met like any other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from moecc.errors import UsageError, described
from moecc.launch.process_info import DISTRIBUTED, ProcessInfo, process_info


def find_cluster(seconds: int) -> tuple[ProcessInfo, Sequence[int] | None]:
    """Return the number of this process in the cluster, and its devices if it shares a machine.

    Args:
      seconds: how long a service of the cluster may take to answer.

    Raises:
      UsageError: there is no cluster, or its variables are incomplete or contradict each other.
    """
    try:
        address, count, number, devices = _detect(seconds)
    except Exception as error:  # whatever a detector of JAX meets in the variables of a cluster
        raise _none_found(described(error)) from None
    if address is None or count is None or number is None:
        raise _none_found(None)
    found = ProcessInfo(str(address), int(count), int(number))
    try:
        # As if a user had stated them: whole numbers in range, and an address with a port.
        checked = process_info(found.environment())
    except UsageError as error:
        raise _none_found(str(error.problems[0])) from None
    assert checked is not None, "all of the variables are given"
    return checked, None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else devices


def _detect(seconds: int) -> tuple[Any, Any, Any, Any]:
    from jax._src.clusters import ClusterEnv

    stated = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found: tuple[Any, Any, Any, Any] = ClusterEnv.auto_detect_unset_distributed_params(
        stated, None, None, None, None, seconds
    )
    return found


def _none_found(found: str | None) -> UsageError:
    return UsageError(
        "no cluster is found in the environment",
        where=DISTRIBUTED,
        expected="Slurm, Open MPI, or a TPU of GKE or GCE, as JAX detects them",
        found=found,
        hint="moecc launch local starts processes on one machine",
    )
