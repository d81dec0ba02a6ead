"""Sharding as passes: annotations, collectives, and the way back."""
