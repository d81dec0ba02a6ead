"""What can be read off a graph without changing it."""
