"""The functions behind commands: convert, verify, generate, check."""
