"""Models: opening, inputs, initialisation, balancing."""
