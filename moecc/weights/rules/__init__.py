"""The rules of the simplifier: each returns a simpler expression, or None where it does not fit."""
