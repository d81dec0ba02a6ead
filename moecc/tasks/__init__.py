"""What commands call: convert, verify, generate, check."""
