"""Any JAX function: ``from moecc import jax as mx``, then ``mx.convert(loss, params, batch, …)``.

The functions need jax and are in the package of the backends, which is loaded when a name is first
used.
"""

from __future__ import annotations

from moecc.support.extras import lazy_names

NAMES = ("Conversion", "convert", "graph", "load")
"""The public names."""

__all__ = list(NAMES)

__getattr__ = lazy_names(__name__, NAMES, "jaxpr", {"jax": "xla"})
