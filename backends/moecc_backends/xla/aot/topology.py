"""The devices that programs are compiled for: TPU slices, GPUs, and this computer's CPU.

Nothing here needs the hardware: libtpu knows its topologies, and XLA compiles for a GPU from a
description of one.  `prepare` must run before jax is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc_backends.xla.trace.typed_jax import Devices


import os
import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from moecc.ahead.compile_in_subprocess import environment
from moecc.errors import MachineError, UsageError
from moecc.plan.machines import Machine
from moecc.plan.networks import Slices
from moecc.support.extras import install_hint
from moecc_backends.xla.aot.gpus import description

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
        found, asked = version("libtpu"), requires("jax") or []
    except PackageNotFoundError:
        return None  # built by hand: nothing is known of it
    wanted = next((m for line in asked if (m := _LIBTPU.match(line))), None)
    if wanted is None or f"{found}.".startswith(f"{wanted[1]}."):
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
    what = missing(machine.kind)
    if what is not None:
        raise MachineError(what)


def prepare(machine: Machine) -> None:
    """Set the environment in which jax can compile for `machine`, before jax is imported."""
    os.environ.update(environment(machine))


def devices(machine: Machine) -> Devices:
    """Return the devices of `machine` as jax describes them.

    Raises:
      MachineError: an extra is missing, or a CPU was not prepared for so many devices.
      UsageError: libtpu refuses the topology.
    """
    import jax
    from jax.experimental import topologies

    require(machine)
    if machine.kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < machine.devices:
            raise MachineError(
                f"jax was started with {len(found)} CPU devices, not {machine.devices}"
            )
        return list(found[: machine.devices])
    if machine.kind == "gpu":
        return _gpus(machine)
    name = machine.compiled_as.partition(":")[2]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise UsageError(f"libtpu refuses the topology {name}", found=reason) from None


def _gpus(machine: Machine) -> Devices:
    from jax.experimental import topologies

    hosts = max(machine.devices // _GPUS_PER_HOST, 1)
    shape = f"1x{hosts}x{machine.devices // hosts}"
    _register_cuda()
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=shape,
        target_config=description(machine.compiled_as.split(":")[1]),
    )
    return list(described.devices)


def _register_cuda() -> None:
    """Make the CUDA plug-in known to jax, which skips it where no GPU is asked for."""
    from importlib import import_module

    name = _cuda_plugin()
    assert name is not None, "`require` has looked"
    from jax._src import xla_bridge

    if not xla_bridge.is_known_platform("cuda"):
        import_module(name).initialize()
