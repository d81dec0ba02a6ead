"""The backends that moecc ships, behind the entry point ``moecc.backends``."""
