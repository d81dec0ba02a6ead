"""Strategies, oracles and laws for testing passes, for users too."""
