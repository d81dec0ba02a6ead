"""Passes, pipeline strings, the registry and the instruments."""
