"""Operations as functions of jax, and graphs as one function."""
