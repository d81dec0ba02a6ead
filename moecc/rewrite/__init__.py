"""Rewriting: patterns, the matcher and its near misses, the driver."""
