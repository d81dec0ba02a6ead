"""The version of moecc."""

__version__ = "0.1.0"
