"""Dense feed-forward blocks to mixtures of experts: gates, layers, weights, and the rewrite."""
