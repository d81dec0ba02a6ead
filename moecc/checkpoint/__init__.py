"""Checkpoints on disk: readers, the writer, the manifest."""
