"""The jobs of `freeze.py`."""
