"""Any PyTorch model: ``from moecc import torch as mt``, then ``mt.convert(model, inputs, …)``.

The functions need torch and jax and are in the package of the backends, which is loaded when a name
is first used.
"""

from __future__ import annotations

from moecc.support.extras import lazy_names

NAMES = ("convert", "convert_folder", "load", "prove_folder")
"""The public names."""

__all__ = list(NAMES)

__getattr__ = lazy_names(__name__, NAMES, "torch_export", {"torch": "torch", "jax": "xla"})
