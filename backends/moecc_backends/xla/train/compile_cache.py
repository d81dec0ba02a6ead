"""Keep compiled programs on disk: a run that is resumed, or a sweep, compiles nothing again."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from moecc_backends.xla.trace.typed_jax import configure

LARGEST_BYTES = 2 << 30
_LEAST_SECONDS = 0.5


def keep_compiled_programs() -> None:
    """Let jax keep programs in ``~/.cache/moecc/xla``, unless it was told where, or not to.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, and ``JAX_ENABLE_COMPILATION_CACHE=false``
    keeps nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    configure("jax_compilation_cache_dir", str(Path(home, "moecc", "xla")))
    configure("jax_compilation_cache_max_size", LARGEST_BYTES)
    configure("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
