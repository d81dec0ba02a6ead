"""Element types, tensor types with named axes, ranges of numbers, and their text."""
