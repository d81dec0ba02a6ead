"""Model families: a config, a graph, and the names of its tensors."""
