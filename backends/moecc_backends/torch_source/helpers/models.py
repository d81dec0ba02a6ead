"""What the models of a file share."""


def with_cache(output, cache, **values):
    """Return an output of transformers, whose releases name its cache differently."""
    name = "cache" if "cache" in output.__dataclass_fields__ else "past_key_values"
    return output(**values, **{name: cache})


def cache_of(output):
    """Return the cache of an output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
