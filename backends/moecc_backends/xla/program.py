"""A program that runs: its memory, its number types, and the processes that share it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moecc.backend import Arrays
from moecc.errors import (
    InputError,
    MachineError,
    Problem,
    UsageError,
    describe_error,
    nearest,
    raise_problems,
)
from moecc.ir.graph import Graph, Value
from moecc.ir.mesh import nearest_multiple
from moecc.ir.structure import fingerprint
from moecc.launch.processes import (
    DISTRIBUTED,
    JOIN,
    ProcessInfo,
    cluster_process,
    hold_lifeline,
    meet,
    note_joined,
    process_info,
    seconds_of_environment,
    watchdog_of_environment,
)
from moecc.train.events import Reason
from moecc.types import F64, Array, DType
from moecc.types import Array as NumpyArray
from moecc.version import __version__
from moecc_backends.xla.lower.function import cast_input, finalize_output, function, lower_values
from moecc_backends.xla.lower.scan import GraphSegment, segments
from moecc_backends.xla.trace.context import DEFAULTS, Options
from moecc_backends.xla.trace.host_arrays import misfits, missing, to_device, to_numpy
from moecc_backends.xla.trace.values import MOST_LISTED, Named, Outputs

_EXHAUSTED = "RESOURCE_EXHAUSTED"
"""How XLA's message begins on every platform."""


_LOST = ("Gloo", "NCCL", "coordination service", "Connection reset", "Connection closed")
"""What jaxlib's collectives say of a process that does not answer (0.10)."""


@contextmanager
def machine_errors() -> Iterator[None]:
    """Raise MachineError where XLA could not allocate, or another process is gone.

    It may decorate a function, too.  A program is dispatched before it has run, so results have to
    be read within, not behind.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        if process_info() is not None and any(word in said for word in _LOST):
            raise MachineError(
                "another process of this run is gone, or cannot be reached",
                found=said.partition("\n")[0],
                hint="its own output says why; moecc train goes on from the last checkpoint",
            ) from None
        if _EXHAUSTED not in said:
            raise
        raise MachineError(
            "the memory of a device is too small for this program",
            found=said.partition(_EXHAUSTED)[2].removeprefix(": ").partition("\n")[0] or None,
            hint="a smaller batch or shorter sequences; in training, more run.micro_batches",
        ) from None


# What a CPU's memory does between two steps: it is kept, rather than given back and cleared anew.
#
# The temporaries of a step are one large buffer. The C library takes such a buffer from the system
# and gives it back, and the system clears each of its pages when it is touched: a fifth of the
# processor time of a step of 5 M parameters, and a sixth with 692 M, whose buffer has 3 GB.

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of ``mallopt``, as glibc's ``malloc.h`` numbers them."""

_NEVER = -1


def keep_freed_memory() -> None:
    """Let this process reuse all buffers that it has freed; without glibc nothing changes.

    Threads take memory from one arena then, since a further one holds no large buffer.  Those of
    jax must not have begun.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)):
        mallopt(parameter, value)


# The types that jax has: without its switch it makes every float64 a float32 without a word.


def in_precision(*types: DType | None) -> AbstractContextManager[object]:
    """Return the context in which arrays of `types` are what they say; None stands for none."""
    return jax.enable_x64(F64 in types)


# A graph run segment by segment, each compiled once a structure.
#
# Equal layers are compiled once, and parameters are fetched, cast and freed layer by layer.


Weight = jax.Array | tuple[jax.Array, ...]
"""A parameter: one array, or one for each expert, so that a step reads only what it needs."""


class SegmentRunner:
    """Segments of graphs, each compiled once a structure.

    Attributes:
      dtype: the type of the computation.
      options: what was chosen for the lowering.
    """

    def __init__(self, dtype: DType, options: Options) -> None:
        self.dtype = dtype
        self.options = options
        self._compiled: dict[tuple[object, ...], Any] = {}

    def _run(
        self,
        segment: GraphSegment,
        alive: dict[Value, jax.Array],
        weights: Sequence[Weight],
        donated: Collection[Value] = (),
    ) -> None:
        """Run a segment on the values `alive`: results join them, and spent values leave.

        XLA writes into the memory of those in `donated` that nothing uses afterwards.
        """
        spent = [v for v in segment.inputs if v in donated and v in segment.last_uses]
        borrowed = [v for v in segment.inputs if v not in spent]
        key = (*segment.key, *map(segment.inputs.index, spent))
        if key not in self._compiled:
            values = (*spent, *borrowed, *segment.params)

            def run(
                spent: list[jax.Array], borrowed: list[jax.Array], weights: Sequence[Weight]
            ) -> list[jax.Array]:
                named = dict(zip(values, (*spent, *borrowed, *weights), strict=True))
                results = lower_values(segment.nodes, named, self.dtype, self.options)
                return [finalize_output(results[v], v, wide=False) for v in segment.outputs]

            self._compiled[key] = jax.jit(run, donate_argnums=0)
        arrays = ([alive[v] for v in part] for part in (spent, borrowed))
        results = self._compiled[key](*arrays, weights)
        alive.update(zip(segment.outputs, results, strict=True))
        for value in segment.last_uses:
            if not value.is_output:
                del alive[value]


class XlaProgram(SegmentRunner):
    """A graph cut into segments.

    Attributes:
      graph: the graph.
      writes: whether this process writes what `run` returns.
    """

    writes = True

    def __init__(self, graph: Graph, dtype: DType, options: Options = DEFAULTS) -> None:
        super().__init__(dtype, options)
        self.graph = graph
        self._segments = segments(graph)

    def run(self, params: Arrays, inputs: Arrays) -> dict[str, NumpyArray]:
        """Return the outputs by name.

        Parameters are looked up in `params` when their segment runs, so a mapping that makes them
        on demand keeps only one layer in memory.

        Raises:
          InputError: an array is missing or does not fit its type.
          MachineError: the memory of a device is too small.
        """
        problems = missing(self.graph, params, inputs)
        sizes: dict[str, int] = {}
        for name, value in self.graph.inputs.items():
            if name in inputs:
                problems += misfits(value, inputs[name], sizes)
        raise_problems(problems)
        with machine_errors(), in_precision(self.dtype):
            alive = {v: self._to_devices(inputs[n], v) for n, v in self.graph.inputs.items()}
            for segment in self._segments:
                weights = [self._to_devices(params[v.name], v) for v in segment.params]
                self._run(segment, alive, weights)
            outputs = self.graph.outputs.items()
            alive |= {v: self._to_devices(params[v.name], v) for _, v in outputs if v.is_param}
            return {
                n: self._to_numpy(finalize_output(Named(alive[v], v.type.names), v))
                for n, v in outputs
            }

    def _to_devices(self, array: Any, value: Value) -> jax.Array:
        """Return a parameter or input on its devices."""
        return to_device(array, value)

    def _to_numpy(self, array: jax.Array) -> NumpyArray:
        return to_numpy(array)


# A session: parameters and caches stay on the device, and caches are updated in place.


class XlaSession(SegmentRunner):
    """See `moecc.decoding.Session`.

    Args:
      params: the parameters by name; each is read once.
      dtype: the type of the computation.
    """

    def __init__(self, params: Arrays, dtype: DType) -> None:
        super().__init__(dtype, Options(in_place=True))
        self._params = params
        self._weights: dict[str, Weight] = {}
        self._values: Outputs = {}
        self._segments: dict[Graph, list[GraphSegment]] = {}

    def keep(self, values: Mapping[str, NumpyArray]) -> None:
        """Keep `values` on the device, in the type of the computation."""
        with in_precision(self.dtype):
            arrays = {n: cast_input(jnp.asarray(a), self.dtype) for n, a in values.items()}
        self._values.update(arrays)

    def kept(self) -> dict[str, NumpyArray]:
        """Return the values that are kept on the device."""
        return {name: to_numpy(array) for name, array in self._values.items()}

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, NumpyArray]:
        """Run `graph`.

        Raises:
          MachineError: the memory of a device is too small.
        """
        with machine_errors(), in_precision(self.dtype):
            alive = {
                v: (to_device(inputs[n], v) if n in inputs else self._values[n])
                for n, v in graph.inputs.items()
            }
            updated = graph.inputs.keys() & graph.outputs.keys()
            donated = {graph.inputs[n] for n in updated.difference(inputs)}
            if graph not in self._segments:
                self._segments[graph] = segments(graph)
            for segment in self._segments[graph]:
                self._run(segment, alive, [*map(self._weight, segment.params)], donated)
            self._values |= {n: alive[graph.outputs[n]] for n in updated}
            return {
                n: to_numpy(finalize_output(Named(alive[v], v.type.names), v))
                for n, v in graph.outputs.items()
                if n not in updated
            }

    def _weight(self, value: Value) -> Weight:
        name, names = value.name, value.type.names
        if name not in self._weights:
            array = self._params[name]
            if len(names) > 2 and names[0] == "expert" and len(array) <= MOST_LISTED:
                problems = misfits(value, array, {})
                raise_problems(problems)
                self._weights[name] = tuple(map(jax.device_put, array))
            else:
                self._weights[name] = to_device(array, value)
        return self._weights[name]


# A graph as the text that jax or XLA makes of it, for people to read.

_XLA_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def emitted(graph: Graph, inputs: Arrays, *, emit: str, dtype: DType, options: Options) -> str:
    """Return `graph` as text.

    Args:
      graph: the graph.
      inputs: arrays for its inputs, of which only the shapes matter.
      emit: ``jaxpr``, what jax traces; ``stablehlo``, what it hands to XLA for the platform; or
        ``hlo``, what XLA compiles for a device that is here.
      dtype: the type of the computation.
      options: choices for the lowering.

    Raises:
      UsageError: there is no such text.
      MachineError: HLO is asked for, for a platform that is not here.
      InputError: the graph has no lowering, or the forced dispatch does not fit it.
    """
    if emit not in _EMITTERS:
        hint = nearest(emit, _EMITTERS)
        raise UsageError(
            f"nothing called {emit!r} is emitted", expected=", ".join(_EMITTERS), hint=hint
        )
    if emit == "hlo" and options.target != jax.default_backend():
        raise MachineError(
            f"XLA compiles for a device, and there is no {options.target} here",
            hint="--emit stablehlo shows what XLA is given for any platform",
        )
    with in_precision(dtype):
        params = {n: _shape(v, v.type.shape, dtype) for n, v in graph.params.items() if v.users}
        shapes = {n: _shape(v, inputs[n].shape, dtype) for n, v in graph.inputs.items()}
        located = replace(options, located=True)
        traced = jax.jit(function(graph, dtype=dtype, options=located)).trace(params, shapes)
        return str(_EMITTERS[emit](traced, options))


def _shape(value: Value, shape: tuple[int, ...], dtype: DType) -> jax.ShapeDtypeStruct:
    """Return an array without elements: nothing of a large model is in memory."""
    kinds: dict[str, DTypeLike] = {"float": dtype.numpy, "int": jnp.int32, "bool": jnp.bool_}
    kind = value.type.dtype.kind
    element = jax.random.key(0).dtype if kind == "key" else kinds[kind]
    return jax.ShapeDtypeStruct(shape, element)


def _stablehlo(traced: jax.stages.Traced, options: Options) -> str:
    """Return a program whose operations have their places in the graph, but no lines of Python."""
    limit = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        lowered = traced.lower(lowering_platforms=(_XLA_PLATFORMS[options.target],))
        module = lowered.compiler_ir("stablehlo")
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    return str(module.operation.get_asm(enable_debug_info=True, use_local_scope=True))


_EMITTERS: dict[str, Callable[[jax.stages.Traced, Options], object]] = {
    "jaxpr": lambda traced, options: traced.jaxpr,
    "stablehlo": _stablehlo,
    "hlo": lambda traced, options: traced.lower().compile().as_text(),
}


# One program in several processes: joining, comparing configurations, arrays that all share.
#
# Every process runs the same program on its devices.  The batch is split over all devices and the
# parameters are replicated; XLA inserts what is needed so that the result is that of one process.

# A cluster whose variables state all processes is met before JAX starts: its client ends its
# process with SIGABRT when a peer never comes. JAX detects Kubernetes and TPUs of GCE itself.


def _find_cluster() -> tuple[ProcessInfo | None, Sequence[int] | None]:
    """Return the process that the variables of a cluster state, and its devices.

    Raises:
      UsageError: the variables are incomplete, or are not numbers.
    """
    try:
        stated = cluster_process(os.environ)
    except UsageError as error:
        raise _none_found(str(error.problems[0])) from None
    if stated is None:
        return None, None
    process, local = stated
    return process, None if local is None or os.environ.get("JAX_LOCAL_DEVICE_IDS") else [local]


def _none_found(reason: str | None) -> UsageError:
    return UsageError(
        "no cluster is found in the environment",
        where=DISTRIBUTED,
        expected="Slurm, Open MPI, Kubernetes, or a TPU of GKE or GCE",
        found=reason,
        hint="moecc launch local starts processes on one machine",
    )


JOIN_SECONDS = 300
"""How long processes wait for one another at the start."""

_WIDTH = 256

_joined: list[ProcessInfo] = []


def join(
    process: ProcessInfo | None, *, seconds: float | None = None, is_told_to_stop: bool = False
) -> None:
    """Meet the other processes; a second call does nothing, nor does one without others.

    Args:
      process: of this process, or None if it is alone, as `moecc.launch.processes` says; one
        that JAX finds is read from the variables of the cluster.
      seconds: how long to wait for the others; by default ``MOECC_JOIN_SECONDS``, or
        `JOIN_SECONDS`.
      is_told_to_stop: whether SIGTERM is a notice, which jax's client catches and passes on to all
        processes; else it ends the process.

    Raises:
      MachineError: they did not come.
      UsageError: there is no cluster to be found, or the variable is no number of seconds.
    """
    if _joined or process is None:
        return
    limit = seconds or seconds_of_environment(JOIN) or JOIN_SECONDS
    devices: Sequence[int] | None = None
    stated: ProcessInfo | None = process
    if process.is_of_cluster:
        stated, devices = _find_cluster()
    if stated is not None:
        meet(stated, limit)
    # CPU devices of several processes need a library to talk through.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", is_told_to_stop)
    try:
        jax.distributed.initialize(
            coordinator_address=stated.coordinator if stated else None,
            num_processes=stated.processes if stated else None,
            process_id=stated.process if stated else None,
            local_device_ids=devices,
            initialization_timeout=ceil(limit),
        )
    except Exception as error:  # whatever a detector of JAX meets in the variables of a cluster
        if stated is None:
            raise _none_found(describe_error(error)) from None
        if not isinstance(error, ValueError | RuntimeError):
            raise
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"the processes did not meet: {reason}", where=stated.coordinator
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


@dataclass
class StopAgreement:
    """Lets all processes stop behind the same step, of which one or all are told to stop.

    jax's client catches SIGTERM in each of several processes, so that no handler of Python's is
    called; what else tells a process to stop is passed on as that signal.

    Attributes:
      reason: returns why this process was told to stop, or None.
    """

    reason: Callable[[], Reason | None]
    _calls: Iterator[int] = field(init=False, default_factory=count)
    _is_passed_on: bool = field(init=False, default=False)

    def __call__(self) -> Reason | None:
        """Return why to stop now; every process calls it behind every step."""
        reason = self.reason()
        if jax.process_count() == 1:
            return reason
        if reason is not None and not self._is_passed_on:
            self._is_passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        # Calls are counted, and not steps, since a run that returns to a checkpoint repeats some.
        is_reached = multihost_utils.reached_preemption_sync_point(next(self._calls))
        return Reason.TERMINATED if is_reached else None


def agreed_seconds() -> float:
    """Return the seconds of the first process's clock, in all of them."""
    now = time.monotonic()
    if jax.process_count() == 1:
        return now
    return float(multihost_utils.broadcast_one_to_all(np.float32(now)))


def agreed_token() -> str:
    """Return random digits of the first process, in all of them."""
    token = np.frombuffer(os.urandom(8), np.uint8)
    if jax.process_count() > 1:
        token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    return token.astype(np.uint8).tobytes().hex()


def is_so_in_all(condition: bool) -> bool:
    """Return whether a condition holds in all processes; each of them calls this."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(np.asarray(multihost_utils.process_allgather(np.asarray(condition)))))


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
    lines = (f"{name}\n{value}".encode()[:_WIDTH] for name, value in sorted(mine.items()))
    rows = [np.frombuffer(line.ljust(_WIDTH, b"\0"), np.uint8) for line in lines]
    gathered = np.asarray(multihost_utils.process_allgather(np.stack(rows)))
    texts = [
        [row.tobytes().rstrip(b"\0").decode(errors="replace").partition("\n") for row in rows]
        for rows in gathered
    ]
    problems = list(differences([[(name, value) for name, _, value in rows] for rows in texts]))
    raise_problems(problems)


def differences(everyone: list[list[tuple[str, str]]]) -> list[Problem]:
    """Return what each process has otherwise than the first.

    Args:
      everyone: the names and values of each process, in one order.
    """
    problems = []
    for number, theirs in enumerate(everyone):
        for (name, first), (_, value) in zip(everyone[0], theirs, strict=True):
            if value != first:
                message = f"process {number} has another {name} than process 0"
                problems.append(Problem(message, None, first or "none", value or "none"))
    return problems


def replicated(array: Array) -> jax.Array:
    """Return `array` whole on every device of every process."""
    return _on_all(array, PartitionSpec())


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
    return _on_all(array, PartitionSpec(*(None,) * axis, "data"))


def _on_all(array: Array, spec: PartitionSpec) -> jax.Array:
    """Return `array` on a row of all devices of all processes."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def whole(array: jax.Array) -> Array:
    """Return a value that all processes share, put together in each of them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


# A graph run by several processes together: the batch sharded over all of their devices.


class MultiProcessProgram(XlaProgram):
    """A graph that all processes run, each giving the same parameters and inputs.

    Attributes:
      watchdog: is informed of every step.

    Raises:
      MachineError: the other processes did not come.
      UsageError: the limit of the watchdog is no number of seconds.
    """

    def __init__(self, graph: Graph, dtype: DType, options: Options, process: ProcessInfo) -> None:
        hold_lifeline()
        self.watchdog = watchdog_of_environment()
        join(process)
        self.watchdog.beat("all processes have met")
        super().__init__(graph, dtype, options)
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
        self.watchdog.enter("step")
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
        self,
        segment: GraphSegment,
        alive: dict[Value, jax.Array],
        weights: Sequence[Weight],
        donated: Collection[Value] = (),
    ) -> None:
        super()._run(segment, alive, weights, donated)
        # What was dispatched may still wait for another process.
        jax.block_until_ready([alive[v] for v in segment.outputs])
        self.watchdog.beat(segment.nodes[-1].loc or "the graph")
