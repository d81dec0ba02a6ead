"""Options of XLA by which collectives run beside computation, for the chips where they do.

Options are no stable interface: other versions of a compiler lack some, and reject a program for
it.  So they are set for the versions and chips alone with which they were tried.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moecc_backends.xla.trace.typed_jax import Devices

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

BY_KIND = {"TPU v5": {**ASYNC_GATHERS, **SPARSE_CORES}}
"""Options by kind of device, as jax calls it; "TPU v5" is v5p."""


def compiler_options(devices: Devices) -> dict[str, str] | None:
    """Return the options for a program over `devices`; None for the compiler's own."""
    found = BY_KIND.get(devices[0].device_kind) if len(devices) > 1 else None
    return found if found and _libtpu().startswith(TRIED) else None


def _libtpu() -> str:
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return ""
