"""The graphs that families share: one module for each shape of model."""
