"""The pass `decode`: a graph that continues texts, with caches of keys and values."""
