"""What the models of a file share."""


def with_cache(output, cache, **values):
    """Return an output of transformers, whose releases name its cache differently."""
    return output(**values, **{_cache_name(output): cache})


def cache_of(output):
    """Return the cache of an output."""
    return getattr(output, _cache_name(output))


def _cache_name(output):
    return "cache" if "cache" in output.__dataclass_fields__ else "past_key_values"
