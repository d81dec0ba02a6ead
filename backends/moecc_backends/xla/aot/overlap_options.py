"""Options of XLA by which collectives run beside computation, for the chips where they do.

Options are no stable interface: other versions of a compiler lack some, and reject a program for
it.  So they are set for the versions and chips alone with which they were tried, and only where
overlap is asked for.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moecc.plan.machines import Machine

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
    found = next((o for chip, o in BY_CHIP.items() if name.startswith(chip)), None)
    return dict(found) if found and _libtpu().startswith(TRIED) else {}


def _libtpu() -> str:
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return ""
