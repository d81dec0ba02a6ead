"""Folders whose matrices are stored quantised, read as if they were not."""
