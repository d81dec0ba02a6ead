"""Specialise a model for training or evaluation: capacity, policy, noise, at compile time."""
