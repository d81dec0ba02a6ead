"""Compiling for hardware that is not attached, and reading what the compiler made."""
