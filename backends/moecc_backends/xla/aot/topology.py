"""The machines that programs are compiled for: TPU slices, GPUs, and this computer's CPU.

Nothing here needs the hardware: libtpu knows its topologies, and XLA compiles for a GPU from a
description of one.  `prepare` must run before jax is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from moecc.errors import MachineError, UsageError, nearest
from moecc_backends.xla.aot.gpus import GPUS, description

TPUS = {"v4": 2, "v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}
"""The generations that libtpu compiles for, and the devices of jax a chip has."""

FORMS = "tpu:v5p:4x4x4 (v4, v5e, v5p, v6e or tpu7x), gpu:h100:8 (h100, h200 or b200), cpu:8"

_GPUS_PER_HOST = 8

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""What keeps jax from looking for accelerators, and libtpu from asking a cloud about itself."""


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to compile for.

    Attributes:
      platform: ``tpu``, ``gpu`` or ``cpu``.
      chip: its generation, ``v5p``; empty for a CPU.
      topology: of TPUs how the chips lie, ``4x4x4``; else empty.
      devices: how many devices jax sees.
    """

    platform: str
    chip: str
    topology: str
    devices: int

    def __str__(self) -> str:
        count = self.topology or str(self.devices)
        return ":".join(part for part in (self.platform, self.chip, count) if part)

    @property
    def gpu_bytes(self) -> int | None:
        """The memory of a GPU; None elsewhere, where the compiler itself says what fits."""
        return GPUS[self.chip].memory_bytes if self.platform == "gpu" else None


def parse_target(text: str) -> Target:
    """Return the machine called `text`.

    Raises:
      UsageError: there is no such machine, or its size cannot be read.
    """
    platform, _, rest = text.partition(":")
    chip, _, size = rest.partition(":")
    if platform == "cpu" and not size:
        return Target("cpu", "", "", _count(text, chip or "1"))
    if platform == "gpu" and chip in GPUS:
        return Target("gpu", chip, "", _count(text, size or "1"))
    if platform == "tpu" and chip in TPUS:
        return _tpu(text, chip, size)
    known = [*(f"tpu:{name}" for name in TPUS), *(f"gpu:{name}" for name in GPUS), "cpu"]
    raise UsageError(
        f"unknown machine {text!r}",
        expected=FORMS,
        hint=nearest(f"{platform}:{chip}", known),
    )


def _count(text: str, size: str) -> int:
    if not size.isdecimal() or int(size) < 1:
        raise UsageError(f"{text!r} says no number of devices", expected=FORMS, found=size)
    return int(size)


def _tpu(text: str, chip: str, topology: str) -> Target:
    if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
        raise UsageError(
            f"{text!r} says no topology", expected=f"tpu:{chip}:2x2x1, for example", found=topology
        )
    chips = 1
    for size in topology.split("x"):
        chips *= int(size)
    return Target("tpu", chip, topology, chips * TPUS[chip])


def missing(platform: str) -> str | None:
    """Return what to install for `platform` in one line, or None where nothing is missing."""
    if platform == "tpu" and find_spec("libtpu") is None:
        return "compiling for TPUs needs libtpu: pip install 'moecc[tpu]'"
    if platform == "gpu" and _cuda_plugin() is None:
        return "compiling for GPUs needs jax's CUDA plug-in: pip install 'moecc[gpu-aot]'"
    return None


def _cuda_plugin() -> str | None:
    # The plug-ins are namespace packages, beside one another in jax_plugins.
    if find_spec("jax_plugins") is None:
        return None
    names = (f"jax_plugins.xla_cuda{version}" for version in (13, 12))
    return next((name for name in names if find_spec(name) is not None), None)


def require(target: Target) -> None:
    """Raise MachineError, with what to install, if `target` needs an extra that is missing."""
    what = missing(target.platform)
    if what is not None:
        raise MachineError(what)


def prepare(target: Target, environment: MutableMapping[str, str] | None = None) -> None:
    """Set the environment in which jax can compile for `target`, before jax is imported."""
    environment = os.environ if environment is None else environment
    environment.update(ENVIRONMENT)
    if target.platform == "cpu":
        flag = f"--xla_force_host_platform_device_count={target.devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()


def devices(target: Target) -> list[Any]:
    """Return the devices of `target` as jax describes them.

    Raises:
      MachineError: an extra is missing, or a CPU was not prepared for so many devices.
      UsageError: libtpu refuses the topology.
    """
    import jax
    from jax.experimental import topologies

    require(target)
    if target.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.devices:
            raise MachineError(
                f"jax was started with {len(found)} CPU devices, not {target.devices}"
            )
        return list(found[: target.devices])
    if target.platform == "gpu":
        return _gpus(target)
    name = f"{target.chip}:{target.topology}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise UsageError(f"libtpu refuses the topology {name}", found=reason) from None


def _gpus(target: Target) -> list[Any]:
    from jax.experimental import topologies

    hosts, rest = divmod(target.devices, _GPUS_PER_HOST)
    if hosts and rest:
        raise UsageError(
            f"{target.devices} GPUs do not fill hosts of {_GPUS_PER_HOST}",
            expected=f"up to {_GPUS_PER_HOST}, or a multiple",
        )
    shape = f"1x{hosts}x{_GPUS_PER_HOST}" if hosts else f"1x1x{rest}"
    _register_cuda()
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=shape, target_config=description(target.chip)
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
