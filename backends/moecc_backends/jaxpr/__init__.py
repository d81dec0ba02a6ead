"""Feed-forward blocks of any JAX function, found by dataflow, rewritten, and run in place.

`convert` is the door.  Where things are, each chapter built on those before:

- `views`, `scopes`: a traced function as equations on variables, and which leaf of the
  parameters a variable is a view of;
- `symbols`, `blocks`: what equations compute on named axes, the blocks among them, and their
  operations in the IR;
- `survey`: where blocks run, who else uses their weights, and which axes are of tokens;
- `graph`: all blocks as one graph, the graph in parts again, the function around them, and the
  blocks rewritten by a pipeline;
- `storage`: where new parameters lie, and their values;
- `run`: the function with its blocks replaced;
- `conversion`: the parameters with all functions of them, and their folder.
"""

from __future__ import annotations

from moecc_backends.jaxpr.conversion import FunctionConversion as Conversion
from moecc_backends.jaxpr.conversion import convert as convert
from moecc_backends.jaxpr.conversion import graph as graph
from moecc_backends.jaxpr.conversion import load as load

__all__ = ["Conversion", "convert", "graph", "load"]
