"""Checkpoints as graphs, and graphs as checkpoints of a family, a GGUF file or a stored graph."""
