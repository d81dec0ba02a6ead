"""Whose collectives a program on a mesh has."""

from __future__ import annotations

EXPLICIT, GSPMD = PARTITIONS = ("explicit", "gspmd")
"""The graph's own, or those that XLA's partitioner adds."""
