"""Random numbers that depend on a seed and on names, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *words: str) -> np.random.Generator:
    """Return a generator that depends on `seed` and `words` alone."""
    digest = hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])
