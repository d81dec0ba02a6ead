"""The pass ``roll-layers``: fold equal layers into one repeated layer."""

from __future__ import annotations
