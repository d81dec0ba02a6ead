"""TOML that people write: strict keys, typed values, every problem with its line."""
