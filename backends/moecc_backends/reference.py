"""The reference backend: NumPy in float64, which defines the meaning of every operation."""

from __future__ import annotations

from moecc.backend import Arrays
from moecc.errors import Problem, raise_problems
from moecc.ir.arrays import Data
from moecc.ir.graph import Graph, where
from moecc.ir.interpreter import ReferenceProgram
from moecc.types import F64, DType


class ReferenceBackend:
    """Runs graphs with the NumPy implementation of each operation."""

    name = "reference"

    def compile(self, graph: Graph, *, dtype: DType = F64) -> ReferenceProgram:
        """Return `graph` compiled; it is always computed in float64.

        Raises:
          InputError: an operation is not implemented.
        """
        problems = [
            Problem("the reference backend has no meaning for this operation", where(node))
            for node in graph
            if node.op.meaning is None
        ]
        raise_problems(problems)
        return ReferenceProgram(graph)

    def run_on_mesh(self, graph: Graph, params: Arrays, inputs: Arrays) -> dict[str, Data]:
        """Return the outputs that the devices of the mesh of `graph` compute together.

        Raises:
          InputError: as `moecc.ir.devices.simulate`.
          AssertionError: devices hold different copies of a replicated value.
        """
        from moecc.ir.devices import simulate  # only meshes need it

        return simulate(graph, params, inputs).outputs
