"""Programs in PyTorch: the text of a model that its owner reads, trains and edits."""

from __future__ import annotations

from moecc.backend import EmittedProgram, Program
from moecc.errors import UsageError
from moecc.ir.graph import Graph
from moecc.types import F32, DType


class TorchSourceBackend:
    """Writes a graph as one readable file of PyTorch; torch is never imported."""

    name = "torch_source"

    def compile(self, graph: Graph, *, dtype: DType = F32) -> Program:
        """Raise UsageError: the text is run by PyTorch, not by moecc."""
        raise UsageError(
            "torch_source writes programs and runs none", hint="moecc emit torch MODEL -o DIR"
        )

    def emit(self, graph: Graph) -> EmittedProgram:
        """Return `graph` as ``modeling_st_moe.py``.

        Raises:
          InputError: the graph has something that cannot be written as PyTorch.
        """
        from moecc_backends.torch_source.source import emit_torch

        return emit_torch(graph)
