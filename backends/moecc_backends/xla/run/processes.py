"""One program in several processes: joining, comparing configurations, arrays that all share.

Every process runs the same program on its devices.  The batch is split over all devices and the
parameters are replicated; XLA inserts what is needed so that the result is that of one process.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moecc.backend import Arrays
from moecc.errors import InputError, MachineError, Problem, UsageError, described
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import nearest_multiple
from moecc.ir.structure import fingerprint
from moecc.launch.processes import (
    DISTRIBUTED,
    JOIN,
    ProcessInfo,
    Watchdog,
    hold_lifeline,
    note_joined,
    process_info,
    seconds_of_environment,
    watchdog_of_environment,
)
from moecc.launch.rendezvous import meet
from moecc.types import Array, DType
from moecc.types import Array as NumpyArray
from moecc.version import __version__
from moecc_backends.xla.lower.scan import GraphSegment
from moecc_backends.xla.run.program import XlaProgram
from moecc_backends.xla.trace.context import Options

# The cluster that JAX detects: its first process and the number of this one.
#
# JAX detects clusters within ``jax.distributed.initialize`` and connects at once, and a client
# whose peer never comes ends its process with SIGABRT. Detected before, a cluster is met like any
# other.


def find_cluster(seconds: int) -> tuple[ProcessInfo, Sequence[int] | None]:
    """Return the number of this process in the cluster, and its devices if it shares a machine.

    Args:
      seconds: how long a service of the cluster may take to answer.

    Raises:
      UsageError: there is no cluster, or its variables are incomplete or contradict each other.
    """
    try:
        from jax._src.clusters import ClusterEnv

        stated = os.environ.get("JAX_COORDINATOR_ADDRESS")
        detected: tuple[Any, Any, Any, Any] = ClusterEnv.auto_detect_unset_distributed_params(
            stated, None, None, None, None, seconds
        )
        address, count, number, devices = detected
    except Exception as error:  # whatever a detector of JAX meets in the variables of a cluster
        raise _none_found(described(error)) from None
    if address is None or count is None or number is None:
        raise _none_found(None)
    process = ProcessInfo(str(address), int(count), int(number))
    try:
        # As if a user had stated them: whole numbers in range, and an address with a port.
        checked = process_info(process.environment())
    except UsageError as error:
        raise _none_found(str(error.problems[0])) from None
    assert checked is not None, "all of the variables are given"
    return checked, None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else devices


def _none_found(reason: str | None) -> UsageError:
    return UsageError(
        "no cluster is found in the environment",
        where=DISTRIBUTED,
        expected="Slurm, Open MPI, or a TPU of GKE or GCE, as JAX detects them",
        found=reason,
        hint="moecc launch local starts processes on one machine",
    )


JOIN_SECONDS = 60
"""How long processes wait for one another at the start."""

_WIDTH = 256

_joined: list[ProcessInfo] = []


def join(process: ProcessInfo | None, *, seconds: float | None = None) -> None:
    """Meet the other processes; a second call does nothing, nor does one without others.

    Args:
      process: of this process, or None if it is alone, as `moecc.launch.processes` says; one
        that JAX finds is read from the variables of the cluster.
      seconds: how long to wait for the others; by default ``MOECC_JOIN_SECONDS``, or
        `JOIN_SECONDS`.

    Raises:
      MachineError: they did not come.
      UsageError: there is no cluster to be found, or the variable is no number of seconds.
    """
    if _joined or process is None:
        return
    limit = seconds or seconds_of_environment(JOIN) or JOIN_SECONDS
    devices: Sequence[int] | None = None
    if process.is_found_by_jax:
        process, devices = find_cluster(ceil(limit))
    meet(process, limit)
    # CPU devices of several processes need a library to talk through.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            process.coordinator,
            process.processes,
            process.process,
            local_device_ids=devices,
            initialization_timeout=ceil(limit),
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"the processes did not meet: {reason}", where=process.coordinator
        ) from None
    _joined.append(process)
    note_joined()


def is_first() -> bool:
    """Whether this is the process that writes what all have made."""
    return jax.process_index() == 0


def meet_processes(point: str) -> None:
    """Wait until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def configuration(**more: str) -> dict[str, str]:
    """Return what has to be equal in all processes, as short texts."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "moecc": __version__,
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "command": digest_of(" ".join(sys.argv[1:])),
        "XLA_FLAGS": flags if len(flags) < 80 else digest_of(flags),
        "devices": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}",
        **more,
    }


def digest_of(content: str | bytes) -> str:
    """Return sixteen hexadecimal digits that stand for `content`."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def arrays_digest(arrays: Mapping[str, Array]) -> str:
    """Return digits that stand for named arrays: names, types, shapes and bytes."""
    total = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(array.tobytes(), total)
    return f"{total:08x}"


def preflight(mine: Mapping[str, str]) -> None:
    """Compare configurations, so that processes that differ do not compute nonsense, or hang.

    Args:
      mine: what has to be equal, by name; all processes give the same names.

    Raises:
      InputError: in every process, if some differ from the first: which, in what.
    """
    if jax.process_count() == 1:
        return
    texts = np.stack([_encoded(f"{name}\n{value}") for name, value in sorted(mine.items())])
    everyone = np.asarray(multihost_utils.process_allgather(texts))
    problems = list(differences([[_decoded(row) for row in rows] for rows in everyone]))
    if problems:
        raise InputError(problems)


def differences(everyone: list[list[tuple[str, str]]]) -> list[Problem]:
    """Return what each process has otherwise than the first.

    Args:
      everyone: for each process the names and values, in one order.
    """
    problems = []
    for number, theirs in enumerate(everyone):
        for (name, first), (_, value) in zip(everyone[0], theirs, strict=True):
            if value != first:
                message = f"process {number} has another {name} than process 0"
                problems.append(Problem(message, None, first or "none", value or "none"))
    return problems


def _encoded(text: str) -> Array:
    data = text.encode()[:_WIDTH]
    return np.frombuffer(data.ljust(_WIDTH, b"\0"), np.uint8)


def _decoded(row: Array) -> tuple[str, str]:
    name, _, value = row.tobytes().rstrip(b"\0").decode(errors="replace").partition("\n")
    return name, value


def data_mesh() -> Mesh:
    """Return all devices of all processes, in a row."""
    return Mesh(np.array(jax.devices()), ("data",))


def replicated(array: Array) -> jax.Array:
    """Return `array` whole on every device of every process."""
    return _global(array, ())


def split_batch(array: Array, axis: int) -> jax.Array:
    """Return `array` with its batch split over all devices; each process gives all of it.

    Raises:
      InputError: the devices do not divide the batch.
    """
    devices, size = jax.device_count(), array.shape[axis]
    if size % devices:
        raise InputError(
            "the devices of all processes do not divide the batch",
            expected=f"a multiple of {devices} sequences",
            found=str(size),
            hint=f"{nearest_multiple(size, devices)} sequences would do",
        )
    return _global(array, (*(None,) * axis, "data"))


def _global(array: Array, axes: tuple[str | None, ...]) -> jax.Array:
    sharding = NamedSharding(data_mesh(), PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def whole(array: jax.Array) -> Array:
    """Return a value that all processes share, put together in each of them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


# A graph run by several processes together: the batch sharded over all of their devices.


def multi_process_program(
    graph: Graph, dtype: DType, options: Options, process: ProcessInfo
) -> MultiProcessProgram:
    """Meet the other processes, and return `graph` ready to run on the devices of all.

    Raises:
      MachineError: they did not come.
      UsageError: the limit of the watchdog is no number of seconds.
    """
    hold_lifeline()
    watchdog = watchdog_of_environment()
    join(process)
    watchdog.beat("all processes have met")
    return MultiProcessProgram(graph, dtype, options, watchdog)


class MultiProcessProgram(XlaProgram):
    """A graph that all processes run, each giving the same parameters and inputs.

    Attributes:
      watchdog: is informed of every step.
    """

    def __init__(self, graph: Graph, dtype: DType, options: Options, watchdog: Watchdog) -> None:
        super().__init__(graph, dtype, options)
        self.watchdog = watchdog
        self.writes = is_first()
        self._read = 0

    def run(self, params: Arrays, inputs: Arrays) -> dict[str, NumpyArray]:
        """Return the outputs by name, whole, in every process.

        Raises:
          InputError: configurations, inputs or parameters differ between processes; the devices
            do not divide the batch; an array is missing or does not fit its type.
        """
        mine = configuration(
            graph=fingerprint(self.graph)[:16],
            dtype=self.dtype.name,
            options=str(self.options),
            inputs=arrays_digest(inputs),
        )
        preflight(mine)
        self.watchdog.beat("configurations agree")
        self._read = 0
        outputs = super().run(params, inputs)
        preflight({"parameters": f"{self._read:08x}"})
        self.watchdog.stop()
        return outputs

    def _to_devices(self, array: Any, value: Value) -> jax.Array:
        # Checks, and narrows what jax has no wide type for.
        here = super()._to_devices(array, value)
        if value.type.dtype.kind == "key":
            return here
        local = np.asarray(here)
        if value.is_param:
            self._read = zlib.crc32(np.ascontiguousarray(local).tobytes(), self._read)
        if value.is_param or "batch" not in value.type:
            return replicated(local)
        return split_batch(local, value.type.names.index("batch"))

    def _to_numpy(self, array: jax.Array) -> NumpyArray:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return super()._to_numpy(array)
        return whole(array)

    def _run(
        self, segment: GraphSegment, inputs: dict[Value, jax.Array], weights: dict[Value, jax.Array]
    ) -> dict[Value, jax.Array]:
        results = super()._run(segment, inputs, weights)
        # What was dispatched may still wait for another process.
        jax.block_until_ready(list(results.values()))
        self.watchdog.beat(segment.nodes[-1].loc or "the graph")
        return results
