"""What a model costs on a machine: memory, arithmetic, traffic; and a search for the best mesh."""
