"""Passes that change the number of experts: more, fewer, merged ones, one dense block."""
