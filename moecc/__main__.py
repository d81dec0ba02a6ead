"""``python -m moecc``."""

from moecc.cli.main import entry

entry()
