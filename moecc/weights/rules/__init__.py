"""The rules of the simplifier: each returns a simpler expression, or None if it does not apply."""
