"""Feed-forward blocks of any JAX function, found by dataflow, rewritten, and run in place."""

from __future__ import annotations

from moecc_backends.jaxpr.conversion import Conversion as Conversion
from moecc_backends.jaxpr.conversion import load as load
from moecc_backends.jaxpr.convert import convert as convert
from moecc_backends.jaxpr.convert import graph as graph
