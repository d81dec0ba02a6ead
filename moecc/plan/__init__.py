"""The cost of a model on a machine: memory, arithmetic, traffic; and a search for the best mesh."""
