"""Index notation: the language in which operations and weight expressions state their meanings."""
