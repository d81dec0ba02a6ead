"""The devices that programs are compiled for: TPU slices, GPUs, and this computer's CPU.

Nothing here needs the hardware: libtpu knows its topologies, and XLA compiles for a GPU from a
description of one.  `prepare` must run before jax is imported.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moecc.errors import MachineError, UsageError
from moecc.jobs.compile import environment
from moecc.plan.machines import Machine, Slices
from moecc.support.extras import install_hint

if TYPE_CHECKING:
    import jax


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
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.name}"
"""


_GPUS_PER_HOST = 8


def missing(kind: str) -> str | None:
    """Return in one line what to install for machines of a `kind`, or None if all fits."""
    if kind == "tpu" and find_spec("libtpu") is None:
        return f"compiling for TPUs needs libtpu: {install_hint('tpu')}"
    if kind == "tpu" and (wanted := _other_libtpu()):
        pair = f"libtpu {version('libtpu')} does not fit jax {version('jax')}"
        return f"{pair}: pip install '{wanted}'"
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
            where=machine.name, expected=f"one slice, {machine.name.rpartition(':')[0]}",
        )  # fmt: skip
    if not machine.compiled_as:
        raise UsageError(
            "nothing is known of this machine's chip that a program could be compiled for",
            where=machine.name, hint='in its file, like = "gpu:h100:8" names one of the table',
        )  # fmt: skip
    reason = missing(machine.kind)
    if reason is not None:
        raise MachineError(reason)


def prepare(machine: Machine) -> None:
    """Set the environment in which jax can compile for `machine`, before jax is imported."""
    os.environ.update(environment(machine))


def devices(machine: Machine) -> list[jax.Device]:
    """Return the devices of `machine` as jax describes them.

    Raises:
      MachineError: an extra is missing, or a CPU was not prepared for so many devices.
      UsageError: libtpu refuses the topology.
    """
    import jax
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
        return _gpus(machine)
    name = machine.compiled_as.partition(":")[2]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise UsageError(f"libtpu refuses the topology {name}", found=reason) from None


def _gpus(machine: Machine) -> list[jax.Device]:
    from jax.experimental import topologies

    hosts = max(machine.devices // _GPUS_PER_HOST, 1)
    shape = f"1x{hosts}x{machine.devices // hosts}"
    from importlib import import_module

    name = _cuda_plugin()
    assert name is not None, "`require` has looked"
    from jax._src import xla_bridge

    if not xla_bridge.is_known_platform("cuda"):
        import_module(name).initialize()
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=shape,
        target_config=description(machine.compiled_as.split(":")[1]),
    )
    return list(described.devices)
