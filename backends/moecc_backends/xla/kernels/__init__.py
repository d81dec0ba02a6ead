"""Products that compilers have no good form of, with gradients of their own."""
