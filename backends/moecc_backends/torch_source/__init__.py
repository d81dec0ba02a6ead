"""Programs in PyTorch: the text of a model that its owner reads, trains and edits."""

from __future__ import annotations

from moecc.backend import EmittedProgram, Program
from moecc.errors import UsageError
from moecc.ir.graph import Graph
from moecc.types import F32, DType


class SourceBackend:
    """Writes a graph as one readable file, which its owner runs.

    Attributes:
      name: of the backend.
      language: the word of ``moecc emit``.
    """

    name: str
    language: str

    def compile(self, graph: Graph, *, dtype: DType = F32) -> Program:
        """Raise UsageError: the text is not run by moecc."""
        raise UsageError(
            f"{self.name} writes programs and runs none",
            hint=f"moecc emit {self.language} MODEL -o DIR",
        )


class TorchSourceBackend(SourceBackend):
    """Writes PyTorch; torch is never imported."""

    name, language = "torch_source", "torch"

    def emit(self, graph: Graph) -> EmittedProgram:
        """Return `graph` as ``modeling_st_moe.py``.

        Raises:
          InputError: the graph has something that cannot be written as PyTorch.
        """
        from moecc_backends.torch_source.source import emit_torch

        return emit_torch(graph)
