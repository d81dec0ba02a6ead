"""A conversion: new parameters, and functions of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from moecc.ir.graph import Graph
from moecc.pipeline.passes import Preserves
from moecc_backends.islands.call import Call, State
from moecc_backends.islands.report import Report
from moecc_backends.xla.trace.options import DEFAULTS, Options


@dataclass(frozen=True)
class Conversion:
    """Converted parameters, and every function of them.

    Attributes:
      params: ``{"params": …, "moe": …}``, the tree with experts in place, and routers by name.
      graph: all blocks as one graph, rewritten.
      report: what was done.
      preserves: what the passes promise.
      state: what functions of the parameters need to know.
    """

    params: Any
    graph: Graph
    report: Report
    preserves: Preserves
    state: State

    def __call__(
        self,
        function: Callable[..., Any],
        *,
        losses: bool = False,
        options: Options = DEFAULTS,
    ) -> Callable[..., Any]:
        """Return `function` on the new parameters, traced and rewritten anew at each trace.

        Args:
          function: takes the dense parameters first.
          losses: whether losses and metrics are returned, too: then the result is a pair of it
            and a dictionary; a scalar, or the first of a tuple if it is one, is the model's loss
            and has ``loss.auxiliary`` added to it.
          options: what is chosen for the lowering.
        """

        @wraps(function)
        def converted(params: Any, *args: Any, **kwargs: Any) -> Any:
            return Call(self.state, function, losses, options).run(params, args, kwargs)

        return converted
