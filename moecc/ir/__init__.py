"""The IR: types, operations, graphs, and their text."""
