"""The graph that a checkpoint of the general layout of st_moe holds, line by line."""

from __future__ import annotations

from moecc.errors import InputError, Problem
from moecc.families.graphs.parameters import GraphRequest, float32_of
from moecc.families.st_moe import GraphConfig
from moecc.ir.graph import Graph
from moecc.ir.text import parse
from moecc.ir.verify import verify
from moecc.types import TensorType
from moecc.weights.expr import Source


def build(config: GraphConfig, request: GraphRequest) -> Graph:
    """Return the graph stored in a config, its parameters read from the tensors of their names.

    Raises:
      InputError: the lines are not a valid graph.
    """
    dtype_of = request.dtype_of or float32_of
    graph = parse(config.text, "config.json: graph")
    verify(graph)
    stated = [name for name, value in graph.params.items() if value.weight is not None]
    if stated:
        fault = "a stored graph reads each parameter from the tensor of its name"
        hint = "remove the weight expression, or convert the model that has it"
        raise InputError(Problem(fault, f"graph: %{name}", hint=hint) for name in stated)
    for name, value in graph.params.items():
        if not value.type.is_static:
            parameter = f"%{name} : {value.type}"
            raise InputError("a stored parameter has known sizes", where="graph", found=parameter)
        value.weight = Source(name, TensorType(dtype_of(name), value.type.axes))
    graph.attrs = {**graph.attrs, "family": config.model_type, "checkpoint": request.checkpoint}
    graph.attrs.setdefault("config", config.to_json())
    return graph
