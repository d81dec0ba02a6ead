"""moecc: a compiler that turns dense Transformers into sparse mixtures of experts."""

__version__ = "0.1.0"
