"""The devices that programs are compiled for: TPU slices, GPUs, and this computer's CPU.

Nothing here needs the hardware: libtpu knows its topologies, and XLA compiles for a GPU from a
description of one.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import jax
from jax.stages import Lowered, Wrapped

from moecc.ahead.request import CompilerFailed, Job, Result
from moecc.errors import InputError, MachineError, MoeccError, Problem, UsageError
from moecc.ir.graph import Graph
from moecc.plan.machines import Machine
from moecc.plan.networks import Slices
from moecc.sharding.vias import GSPMD
from moecc.support.extras import install_hint
from moecc.support.text import amount
from moecc.train.settings import StepSpec
from moecc_backends.xla.census import census
from moecc_backends.xla.program import in_precision
from moecc_backends.xla.trace.values import PyTree
from moecc_backends.xla.train.step import make_step

# GPUs as XLA wants them described, to compile for one that is not attached.
#
# The numbers are what the CUDA driver reports of each; XLA carries the same under
# ``xla/backends/gpu/target_config/specs``.


@dataclass(frozen=True, slots=True)
class Gpu:
    """What sets one kind of GPU apart from another."""

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int
    shared_bytes: int = 233_472
    fpus: int = 128


GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        1.41,
        85_100_068_864,
        2_039_040_000_000,
        41_943_040,
        shared_bytes=167_936,
        fpus=64,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800
    ),
    "h200": Gpu(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864
    ),
}

_COMMON = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536"""
"""What Ampere, Hopper and Blackwell have alike."""

CUDNN = (9, 8)
"""The version of cuDNN that programs are compiled for."""

_RESERVED_BYTES = 1024
"""Of the shared memory of a core, which a block cannot have."""


def description(kind: str) -> str:
    """Return the GPU `kind` as a ``GpuTargetConfigProto`` in text."""
    gpu = GPUS[kind]
    major, minor = gpu.capability
    return f"""gpu_device_info {{{_COMMON}
  shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block_optin: {gpu.shared_bytes - _RESERVED_BYTES}
  fpus_per_core: {gpu.fpus}
  core_count: {gpu.cores}
  memory_bandwidth: {gpu.memory_bytes_per_second}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
device_description_str: "{gpu.name}"
"""


_GPUS_PER_HOST = 8


def missing(kind: str) -> str | None:
    """Return in one line what to install for machines of a `kind`, or None if all fits."""
    if kind == "tpu" and find_spec("libtpu") is None:
        return f"compiling for TPUs needs libtpu: {install_hint('tpu')}"
    if kind == "tpu" and (wanted := _other_libtpu()):
        pair = f"libtpu {version('libtpu')} does not fit jax {version('jax')}"
        return f"{pair}: python -m pip install '{wanted}'"
    if kind == "gpu" and _cuda_plugin() is None:
        return f"compiling for GPUs needs jax's CUDA plug-in: {install_hint('gpu-aot')}"
    return None


_LIBTPU = re.compile(r"libtpu\s*==\s*([0-9.]+)\.\*")


def _other_libtpu() -> str | None:
    """Return the libtpu that jax asks for, if the one installed is another.

    A pair that jax was not built for crashes the compiler of a training step.
    """
    try:
        installed, asked = version("libtpu"), requires("jax") or []
    except PackageNotFoundError:
        return None  # built by hand: nothing is known of it
    wanted = next((m for line in asked if (m := _LIBTPU.match(line))), None)
    if wanted is None or f"{installed}.".startswith(f"{wanted[1]}."):
        return None
    return wanted[0].replace(" ", "")


def _cuda_plugin() -> str | None:
    # The plug-ins are namespace packages, beside one another in jax_plugins.
    if find_spec("jax_plugins") is None:
        return None
    names = (f"jax_plugins.xla_cuda{version}" for version in (13, 12))
    return next((name for name in names if find_spec(name) is not None), None)


def require(machine: Machine) -> None:
    """Raise an error unless programs can be compiled for `machine` here.

    Raises:
      MachineError: an extra is missing; with what to install.
      UsageError: the chip of a user's own machine is not known.
    """
    if isinstance(machine.network, Slices):
        raise UsageError(
            "steps on several slices are planned, and not compiled",
            where=machine.name,
            expected=f"one slice, {machine.name.rpartition(':')[0]}",
        )
    if not machine.compiled_as:
        raise UsageError(
            "nothing is known of this machine's chip that a program could be compiled for",
            where=machine.name,
            hint='in its file, like = "gpu:h100:8" names one of the table',
        )
    reason = missing(machine.kind)
    if reason is not None:
        raise MachineError(reason)


def devices(machine: Machine) -> list[jax.Device]:
    """Return the devices of `machine` as jax describes them.

    Raises:
      MachineError: an extra is missing, or a CPU was not prepared for so many devices.
      UsageError: libtpu refuses the topology.
    """
    from jax.experimental import topologies

    require(machine)
    if machine.kind == "cpu":
        cpus = jax.devices("cpu")
        if len(cpus) < machine.devices:
            raise MachineError(
                f"jax was started with {len(cpus)} CPU devices, not {machine.devices}"
            )
        return list(cpus[: machine.devices])
    if machine.kind == "gpu":
        from jax._src import xla_bridge
        from jax._src.cudnn import fused_attention_stablehlo

        plugin = _cuda_plugin()
        assert plugin is not None, "`require` has looked"
        if not xla_bridge.is_known_platform("cuda"):
            import_module(plugin).initialize()
        # To lower attention, jax asks the installed cuDNN for its version, and there is none here.
        fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN[0] * 10000 + CUDNN[1] * 100
        hosts = max(machine.devices // _GPUS_PER_HOST, 1)
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x{hosts}x{machine.devices // hosts}",
            target_config=description(machine.compiled_as.split(":")[1]),
        )
        return list(described.devices)
    name = machine.compiled_as.partition(":")[2]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise UsageError(f"libtpu refuses the topology {name}", found=reason) from None


# A job of `moecc compile`, done with XLA.

# Options of XLA by which collectives run beside computation, for the chips where they do.
#
# Options are no stable interface: other versions of a compiler lack some, and reject a program for
# it. So they are set for the versions and chips alone with which they were tried, and only where
# overlap is asked for.

TRIED = "0.0.42"
"""The versions of libtpu begin with this that take these options."""

ASYNC_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
"""All-gathers as steps of the products that stand before their users."""

SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
}
"""Reductions by the cores that a chip has for embeddings, while the others multiply."""

OF_ALL_DEVICES = {
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
}
"""What runs over all devices, and not along one mesh axis, stays a gather or a reduce-scatter.
Otherwise it becomes an all-reduce, which sends twice as much and has no parts."""

SCHEDULE = {
    "xla_tpu_sparse_core_reduce_scatter_offload_min_size_in_bytes": str(1 << 15),
    "xla_tpu_sparse_core_reduce_scatter_latency_multiplier": "4",
}
"""Shards below 32 KiB, those of routers, are not given to the SparseCores: they reduce one gradient
at a time, and would be taken by it for as long as the scheduler likes.  And reductions are taken to
last longer than by default, where it began one next to no product."""

BY_CHIP = {"tpu:v5p": {**ASYNC_GATHERS, **SPARSE_CORES, **OF_ALL_DEVICES, **SCHEDULE}}
"""Options by the beginning of the names of machines."""


def overlap_options(machine: Machine) -> dict[str, str]:
    """Return the options for a program for `machine`; none where the compiler's own do.

    Their programs have run on no device yet, so they are asked for.
    """
    name = machine.compiled_as or machine.name
    try:
        is_tried = version("libtpu").startswith(TRIED)
    except PackageNotFoundError:
        is_tried = False
    return next((o for c, o in BY_CHIP.items() if is_tried and name.startswith(c)), {})


# Compiling a function for hardware that is not attached, and what came of it.

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
"""How libtpu reports that a program is too large."""


class DoesNotFit(InputError):
    """The compiler reports that a device has not enough memory.

    Attributes:
      needed_bytes: what the program needs, as far as the compiler reports.
      available_bytes: what there is.
    """

    def __init__(self, needed_bytes: int, available_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        super().__init__(
            "the program does not fit into the memory of a device",
            expected=f"{available_bytes / 1e9:.2f} GB at most",
            found=f"{needed_bytes / 1e9:.2f} GB",
            hint="a larger mesh, rematerialisation, or fewer tokens a batch",
        )


@dataclass(frozen=True)
class Compiled:
    """A program compiled ahead of time.

    Attributes:
      seconds: the time that XLA took.
      memory: bytes of one device: ``arguments_bytes`` are parameters, optimiser state and inputs;
        ``outputs_bytes`` results, of which ``aliased_bytes`` take the place of donated arguments;
        ``temporaries_bytes`` live while the program runs; ``code_bytes`` are the program itself,
        and ``peak_bytes`` the most that is needed at a time, as the compiler reports.
      hlo: the optimised program, as one device runs it.
      remarks: what the compiler was told for want of a program by its defaults.
    """

    seconds: float
    memory: dict[str, int]
    hlo: str
    remarks: tuple[str, ...] = ()


def lower(function: Wrapped, arguments: Sequence[PyTree], machine: Machine) -> Lowered:
    """Trace and lower a jitted `function` of abstract `arguments` for `machine`."""
    return function.trace(*arguments).lower(lowering_platforms=(_platform(machine),))


def _platform(machine: Machine) -> str:
    return {"gpu": "cuda"}.get(machine.kind, machine.kind)


UNTILED = "Couldn't find output tile sizes"
"""How XLA for GPUs rejects a program for one of its products. It can cut none of its own kernels
for it, and without a device it measures no library's."""

WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}
"""The option of XLA by which products are cuBLAS's."""


def compile_lowered(
    lowered: Lowered, machine: Machine, options: Mapping[str, str | float] | None = None
) -> Compiled:
    """Compile what `lower` returned, with `options` of XLA.

    Raises:
      DoesNotFit: a device has not enough memory.
      CompilerFailed: the compiler rejects the program.
    """
    start = time.perf_counter()
    # jax takes numbers, which its type leaves out.
    xla_options: dict[str, Any] = dict(options or {})
    remarks: tuple[str, ...] = ()
    try:
        try:
            compiled = lowered.compile(compiler_options=xla_options or None)
        except RuntimeError as error:
            if UNTILED not in str(error):
                raise
            remarks = ("products by cuBLAS: XLA's own kernels have no tiles for one of them",)
            compiled = lowered.compile(compiler_options={**xla_options, **WITHOUT_TRITON})
    except RuntimeError as error:
        raise refusal(error) from None
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    memory = {
        f"{name}_bytes": int(getattr(analysis, f"{kind}_size_in_bytes"))
        for name, kind in {
            "arguments": "argument",
            "outputs": "output",
            "aliased": "alias",
            "temporaries": "temp",
            "code": "generated_code",
        }.items()
    }
    peak = int(getattr(analysis, "peak_memory_in_bytes", 0))
    if machine.kind == "cpu" or not peak:
        # The peak that XLA's CPU compiler reports leaves the temporaries out.
        peak = sum(memory.values()) - memory["code_bytes"] - 2 * memory["aliased_bytes"]
    return Compiled(seconds, {**memory, "peak_bytes": peak}, compiled.as_text() or "", remarks)


def host_peak_bytes() -> int:
    """Return the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def refusal(error: RuntimeError) -> MoeccError:
    """Return the compiler's error: `DoesNotFit` where it is about the memory of a device."""
    matches = (pattern.search(str(error)) for pattern in _TOO_LARGE)
    report = next((match for match in matches if match is not None), None)
    if report is None:
        words = str(error).strip().splitlines() or [type(error).__name__]
        return CompilerFailed("the compiler rejects the program", found=words[0][:300])
    needed, available = (int(float(report[at]) * _UNITS[report[at + 1]]) for at in (1, 3))
    return DoesNotFit(needed, available)


LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
"""What XLA may spend on the speed of a program, from -1 to 1; its default is 0."""


def compile_ahead(graph: Graph, job: Job) -> Result:
    """Compile a step of `graph`.

    Raises:
      MachineError: an extra is missing.
      UsageError: libtpu refuses the topology.
      InputError: the mesh does not suit the graph.
    """
    if job.request.export and find_spec("flatbuffers") is None:
        raise MachineError("exporting needs flatbuffers", hint=install_hint("export"))
    with _in_precision(job):
        return _compiled(graph, job)


def lower_step(graph: Graph, job: Job) -> Lowered:
    """Lower a step of `graph`, compiling nothing; raises as `compile_ahead` does."""
    with _in_precision(job):
        return lower(*_step(graph, job), job.machine)


def _in_precision(job: Job) -> AbstractContextManager[object]:
    config = job.request.config
    return in_precision(config.compute_type, config.weight_type, config.reduce_type)


def _step(graph: Graph, job: Job) -> tuple[Wrapped, tuple[PyTree, ...]]:
    """Return the jitted step of a job, and its abstract arguments."""
    config = job.request.config
    layout = job.layout if config.partition == GSPMD else None
    spec = StepSpec(job.sizes, config, job.update, platform=job.machine.kind, layout=layout)
    return make_step(graph, spec, devices(job.machine))


def _compiled(graph: Graph, job: Job) -> Result:
    request, machine = job.request, job.machine
    function, arguments = _step(graph, job)
    start = time.perf_counter()
    lowered = lower(function, arguments, machine)
    seconds = time.perf_counter() - start
    program = lowered.as_text() if request.emit == "stablehlo" else ""
    artefact = b""
    if request.export:
        from jax import export

        exported = export.export(function, platforms=[_platform(machine)])(*arguments)
        artefact = bytes(exported.serialize())
    options = overlap_options(machine) if request.config.overlap else {}
    try:
        compiled = compile_lowered(
            lowered, machine, {**options, **(LEAST_EFFORT if request.quick else {})}
        )
    except DoesNotFit as error:
        return Result(
            seconds,
            time.perf_counter() - start - seconds,
            host_peak_bytes(),
            None,
            error.needed_bytes,
            error.available_bytes,
            program=program,
            artefact=artefact,
        )
    counted = census(compiled.hlo)
    return Result(
        lower_seconds=seconds,
        compile_seconds=compiled.seconds,
        host_peak_bytes=host_peak_bytes(),
        memory=compiled.memory,
        needed_bytes=compiled.memory["peak_bytes"],
        flops=counted.flops,
        collectives=counted.by_kind(),
        overlap=counted.overlap(),
        unknown_loops=counted.unknown_loops,
        opaque=counted.opaque,
        remarks=compiled.remarks,
        program=compiled.hlo if request.emit == "hlo" else program,
        artefact=artefact,
    )


# A step that `moecc compile --save` wrote, read back and called.

_FEW = 4
"""How many arrays are named where arguments do not suit a program."""


class ExportedStep:
    """A program of `jax.export`, with the arguments that it takes.

    Attributes:
      platforms: what it was compiled for: ``("cpu",)``, ``("tpu",)``, ``("cuda",)``.
      devices: how many it runs on.
      arguments: shapes and types of its arguments, as trees: parameters by the names that
        ``params()`` of the model has after the passes that the report names, and inputs by theirs;
        of a training step the state, the batch, a random key and the learning rate.
    """

    def __init__(self, exported: PyTree) -> None:
        self._exported = exported
        self.platforms: tuple[str, ...] = tuple(exported.platforms)
        self.devices: int = exported.nr_devices
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
        self.arguments: PyTree = jax.tree.unflatten(exported.in_tree, shapes)[0]
        self._types = _types(self.arguments)

    def __repr__(self) -> str:
        leaves = len(self._exported.in_avals)
        where = f"{' or '.join(self.platforms)}, {amount(self.devices, 'device')}"
        return f"<moecc.LoadedStep {where}, {leaves} arrays>"

    def place(self, *arguments: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """Return arguments with every array where the program expects it.

        Args:
          *arguments: arrays, as `arguments` describes them.
          mesh: the devices, with the axes and sizes that the program was compiled for.
        """
        shardings = self._exported.in_shardings_jax(mesh)
        places = jax.tree.unflatten(self._exported.in_tree, shardings)[0]
        return jax.tree.map(
            lambda a, s: a if s is None else jax.device_put(a, s), arguments, places
        )

    def __call__(self, *arguments: PyTree) -> PyTree:
        """Run the program.

        Raises:
          InputError: the arguments are others than `arguments`.
        """
        types, expected = _types(arguments), self._types
        names = [n for n in {**expected, **types} if types.get(n) != expected.get(n)]
        if names:
            raise InputError(
                Problem(
                    f"the program takes other arguments ({len(names)} differ)",
                    f"argument {name}",
                    expected=expected.get(name, "no such array"),
                    found=types.get(name, "none"),
                    hint="step.arguments has them; parameters are those after the passes of the "
                    "report",
                )
                for name in names[:_FEW]
            )
        return self._exported.call(*arguments)


def _types(tree: PyTree) -> dict[str, str]:
    """Return type and shape of each array by its path: ``[0]['lm_head.weight']``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    types = {}
    for path, leaf in leaves:
        try:
            # Every step asks this of its whole state: arrays of jax are not traced for it.
            is_typed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
            shape = leaf if is_typed else jax.eval_shape(lambda x: x, leaf)
            type = f"{shape.dtype}{list(shape.shape)}"
        except TypeError:
            type = f"no array, but {leaf.__class__.__name__}"
        types[jax.tree_util.keystr(path)] = type
    return types


def load_step(data: bytes, where: str) -> ExportedStep:
    """Return the program in the bytes of a file.

    Raises:
      InputError: it is none.
      MachineError: an extra is missing.
    """
    if find_spec("flatbuffers") is None:
        raise MachineError("reading an artefact needs flatbuffers", hint=install_hint("export"))
    from jax import export

    try:
        return ExportedStep(export.deserialize(bytearray(data)))
    # Flatbuffers have no checks of their own: what is no artefact fails in any way.
    except Exception as error:
        raise InputError(
            "not an artefact of moecc compile --save",
            where=where,
            found=f"{type(error).__name__}: {error}"[:200],
        ) from None
