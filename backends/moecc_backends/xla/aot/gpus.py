"""GPUs as XLA wants them described, to compile for one that is not attached.

The numbers are what the CUDA driver reports of each; XLA carries the same under
``xla/backends/gpu/target_config/specs``.
"""

from __future__ import annotations

from dataclasses import dataclass


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
