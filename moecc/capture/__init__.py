"""Statistics of the values of a model over texts, which methods read."""
