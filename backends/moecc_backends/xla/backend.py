"""The XLA backend: graphs run, compiled ahead of time, or shown as what XLA is given.

`function` gives a graph as a pure function, for ``jax.jit`` and ``jax.grad``; the backend's methods
do the rest.  Where things are:

- `trace`: values, the context of a trace and the table of lowerings, options;
- `kernels`: products and attention, on plain arrays;
- `dispatch`: the strategies that bring tokens to experts and back, and their exchanges between
  devices; `dispatch.choose` decides;
- `lower`: operations by name; graphs as a function, under `shard_map`, for GSPMD;
- `program`, `train`, `ahead`: programs, training steps, compilation for other machines; `census`
  of what was compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from moecc.ahead.request import Job, LoadedStep, Result
from moecc.backend import Arrays
from moecc.decoding import PlainSession, ReadOnce, Session
from moecc.errors import Problem, raise_problems
from moecc.ir.graph import Graph, where
from moecc.launch.processes import process_info
from moecc.train.events import Training, TrainJob
from moecc.train.scoring import Scorer
from moecc.types import F32, DType
from moecc_backends.xla.dispatch.choose import dispatch_problems
from moecc_backends.xla.import_jax import find_devices, keep_compiled_programs
from moecc_backends.xla.lower.function import function as function
from moecc_backends.xla.program import MultiProcessProgram, XlaProgram, XlaSession, emitted
from moecc_backends.xla.trace.context import AUTO, DEFAULTS, LOWERINGS, Options
from moecc_backends.xla.trace.host_arrays import jax_inputs as jax_inputs
from moecc_backends.xla.trace.values import Function


class XlaBackend:
    """Runs graphs through XLA."""

    name = "xla"

    def compile(
        self, graph: Graph, *, dtype: DType = F32, options: Options = DEFAULTS
    ) -> XlaProgram:
        """Return `graph` ready to run in `dtype`, on all processes of the environment.

        Raises:
          MachineError: the processes did not meet.
          InputError: an operation has no lowering, an output is ragged, or a dispatch lowering is
            forced that does not fit.
        """
        _check(graph, options)
        process = process_info()
        if process is not None:
            return MultiProcessProgram(graph, dtype, options, process)
        find_devices()
        return XlaProgram(graph, dtype, options)

    def function(self, graph: Graph, *, dtype: DType = F32) -> Function:
        """Return `graph` as ``f(params, inputs) → outputs``, for ``jax.jit`` and ``jax.grad``.

        Raises:
          InputError: an operation has no lowering, or an output is ragged.
        """
        _check(graph, DEFAULTS)
        return function(graph, dtype=dtype)

    def compile_ahead(self, graph: Graph, job: Job) -> Result:
        """Compile a step of `graph` for hardware that need not be attached; see `moecc.ahead`."""
        from moecc_backends.xla.ahead import compile_ahead

        return compile_ahead(graph, job)

    def load_step(self, data: bytes, where: str) -> LoadedStep:
        """Return a program that `moecc compile --save` wrote. Raises InputError, MachineError."""
        from moecc_backends.xla.ahead import load_step

        return load_step(data, where)

    def train(self, job: TrainJob) -> AbstractContextManager[Training]:
        """Bring a run onto the devices; see `moecc.train.events`."""
        from moecc_backends.xla.train.loop import training

        return training(job)

    def scorer(self, graph: Graph, params: Arrays, *, dtype: DType) -> Scorer:
        """Return what scores rows of texts; see `moecc.train.scoring`."""
        from moecc_backends.xla.train.step import scorer

        find_devices()
        return scorer(graph, params, dtype=dtype)

    def session(self, params: Arrays, *, dtype: DType) -> Session:
        """Return a session, whose parameters and caches stay on the device.

        With several processes, which share parameters, values go in and out at each run.
        """
        if process_info() is not None:
            return PlainSession(self, ReadOnce(params), dtype)
        find_devices()
        keep_compiled_programs()
        return XlaSession(params, dtype)

    def lower(
        self,
        graph: Graph,
        inputs: Arrays,
        *,
        emit: str,
        dtype: DType = F32,
        options: Mapping[str, str | None],
    ) -> str:
        """Return `graph` as text: a ``jaxpr``, ``stablehlo``, or ``hlo`` as compiled here.

        The options ``dispatch`` and ``platform`` are those of `Options`.

        Raises:
          UsageError: there is no such text, dispatch lowering or platform.
          MachineError: HLO is asked for, for a platform that is not here.
          InputError: the graph has no lowering, or the forced dispatch does not fit it.
        """
        find_devices()
        chosen = Options(options.get("dispatch") or AUTO, options.get("platform"))
        return emitted(graph, inputs, emit=emit, dtype=dtype, options=chosen)


def _check(graph: Graph, options: Options) -> None:
    """Raise InputError with all that keeps `graph` from being lowered."""
    problems = [
        Problem("a ragged value cannot be returned", f"output {name}", found=str(value.type))
        for name, value in graph.outputs.items()
        if value.type.ragged
    ]
    problems += [
        Problem(f"the xla backend cannot lower {node.op}", where(node))
        for node in graph
        if node.op.name not in LOWERINGS
    ]
    problems += dispatch_problems(graph, options)
    raise_problems(problems)
