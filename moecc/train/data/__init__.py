"""Batches: a pure function of a recipe and a number, on however many hosts."""
