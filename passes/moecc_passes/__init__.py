"""The passes that moecc ships, behind the entry point ``moecc.passes``."""
