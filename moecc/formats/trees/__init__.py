"""Checkpoints of JAX programs: trees of arrays in zarr, as Orbax and T5X write them."""

from __future__ import annotations
