"""A graph run by several processes together: the batch sharded over all of their devices."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.backend import Arrays
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import fingerprint
from moecc.launch.member import Watchdog, hold_lifeline, watchdog_of_environment
from moecc.launch.process_info import ProcessInfo
from moecc.types.arrays import Array as NumpyArray
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.segments import Segment
from moecc_backends.xla.run.processes import (
    arrays_digest,
    configuration,
    is_first,
    join,
    preflight,
    replicated,
    split_batch,
    whole,
)
from moecc_backends.xla.run.program import XlaProgram
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.trace.typed_jax import wait_for


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
        self, segment: Segment, given: dict[Value, jax.Array], weights: dict[Value, jax.Array]
    ) -> dict[Value, jax.Array]:
        results = super()._run(segment, given, weights)
        # What was dispatched may still wait for another process.
        wait_for(results.values())
        self.watchdog.beat(segment.nodes[-1].loc or "the graph")
        return results
