"""Checkpoints on disk: readers, the writer, the manifest."""

from __future__ import annotations
