"""Weights as typed expressions, and the evaluator that streams them."""
