"""``python -m moecc``."""

from moecc.cli import entry

entry()
