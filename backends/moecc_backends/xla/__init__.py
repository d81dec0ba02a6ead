"""The XLA backend: lowering through jax."""
