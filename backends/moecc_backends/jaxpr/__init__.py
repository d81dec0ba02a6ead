"""Feed-forward blocks of any JAX function, found by dataflow, rewritten, and run in place.

`convert` is the door.  Where things are, each chapter built on those before:

- `jaxprs`, `views`, `scopes`: a traced function as equations on variables, and which leaf of the
  parameters a variable is a view of;
- `symbols`, `blocks`: what equations compute on named axes, the blocks among them, and their
  operations in the IR;
- `survey`, `labels`: where blocks run, who else uses their weights, and which axes are of tokens;
- `graph`: all blocks as one graph, the graph in parts again, and the function around them;
- `storage`: where new parameters lie, and their values;
- `run`, `call`: the function with its blocks replaced;
- `conversion`, `convert`: the parameters with all functions of them, and their folder.
"""

from __future__ import annotations

from moecc_backends.jaxpr.conversion import FunctionConversion as Conversion
from moecc_backends.jaxpr.conversion import load as load
from moecc_backends.jaxpr.convert import convert as convert
from moecc_backends.jaxpr.convert import graph as graph

__all__ = ["Conversion", "convert", "graph", "load"]
