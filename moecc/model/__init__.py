"""A model: opened, given inputs, initialised, balanced."""
