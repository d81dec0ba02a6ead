"""Continuing texts: graphs that take tokens as they come, and caches between their runs."""
