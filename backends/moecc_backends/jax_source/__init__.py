"""Programs in JAX: the text of a model as functions of a dictionary of parameters."""

from __future__ import annotations

from moecc.backend import EmittedProgram
from moecc.ir.graph import Graph
from moecc_backends.torch_source import SourceBackend


class JaxSourceBackend(SourceBackend):
    """Writes jax.numpy."""

    name, language = "jax_source", "jax"

    def emit(self, graph: Graph) -> EmittedProgram:
        """Return `graph` as ``jax_st_moe.py``.

        Raises:
          InputError: the graph has something that cannot be written.
        """
        from moecc_backends.jax_source.source import emit_jax

        return emit_jax(graph)
