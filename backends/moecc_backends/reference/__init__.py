"""The reference interpreter: NumPy, float64, the meaning of every operation."""
