"""What strategies share whose rows are not made at `dispatch`, but when they are combined."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax

from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import Deferred, Named


@dataclass(frozen=True)
class Deferral:
    """A routing whose rows, and what becomes of them, are deferred until `unpermute`.

    Attributes:
      routing: what was routed.
    """

    routing: Routing

    @cached_property
    def _deferred(self) -> Deferred:
        return Deferred(self.routing)

    def permute(self, x: Named) -> Deferred:
        """Make nothing: rows are made when they are combined."""
        return self._deferred

    def permute_gates(self, gates: jax.Array) -> Deferred:
        """Make nothing yet, as of rows."""
        return self._deferred
