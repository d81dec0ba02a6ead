"""Programs in JAX: the text of a model as functions of a dictionary of parameters."""

from __future__ import annotations

from moecc.backend import EmittedProgram, Program
from moecc.errors import UsageError
from moecc.ir.graph import Graph
from moecc.types import F32, DType


class JaxSourceBackend:
    """Writes a graph as one readable file of jax.numpy."""

    name = "jax_source"

    def compile(self, graph: Graph, *, dtype: DType = F32) -> Program:
        """Raise UsageError: its owner runs the text."""
        raise UsageError("jax_source writes programs and runs none", hint="the xla backend runs")

    def emit(self, graph: Graph) -> EmittedProgram:
        """Return `graph` as ``jax_st_moe.py``.

        Raises:
          InputError: the graph has something that cannot be written.
        """
        from moecc_backends.jax_source.source import emit_jax

        return emit_jax(graph)
