"""Training, as far as it needs no jax: recipes, token files, batches, run folders."""
