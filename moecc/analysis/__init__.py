"""Analyses: facts read from a graph without changing it."""
