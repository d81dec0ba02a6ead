"""Bytes and seconds of a collective.

Bytes are what each device sends to others, by the algorithm that sends the least: rings for gathers
and reductions, a message to each peer for exchanges.  ``tensor_bytes`` is how compiled programs are
counted: the size of the full tensor, of an exchange that of one device's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moecc.plan.networks import Route


def sent_bytes(op: str, devices: int, tensor_bytes: float) -> float:
    """Return the bytes that one device sends.

    Args:
      op: a collective that sends something.
      devices: how many take part.
      tensor_bytes: the gathered result of an all-gather, the operand of a reduce-scatter or
        all-reduce, the rows of one device for an exchange; the rows are spread evenly.

    An all-gather passes every part but one on, (n − 1)/n of the result, and a reduce-scatter is the
    same backwards; an all-reduce is both.  An exchange keeps its own part.
    """
    share = (devices - 1) / devices
    return tensor_bytes * share * (2 if op == "all_reduce" else 1)


def rows_sent(counts: Sequence[Sequence[int]], row_bytes: float) -> list[float]:
    """Return the bytes that each device sends in an exchange whose numbers of rows are known.

    Args:
      counts: for each device, how many of its rows go to each device, itself included.
      row_bytes: of one row.
    """
    return [row_bytes * (sum(row) - row[i]) for i, row in enumerate(counts)]


def seconds(op: str, route: Route, tensor_bytes: float) -> float:
    """Return the seconds of a collective on ideal links; arguments as for `sent_bytes`."""
    if op.endswith("all_to_all"):
        return route.all_to_all(tensor_bytes)
    return route.all_gather(tensor_bytes) * (2 if op == "all_reduce" else 1)


class Transfer(NamedTuple):
    """A collective of a step.

    Attributes:
      op: a collective that sends something.
      axes: the mesh axes that it runs over.
      tensor_bytes: of one, see `sent_bytes`.
      times: how often a step does it, in one part.
      why: what for, in a few words.
      waits: whether computation has to wait for it; parameters and their gradients do not.
      odd: whether it gathers shards with odd numbers of rows.
      weight: the parameter that it gathers, or whose gradient it sums.
      leaves_work: of one that computation waits for, whether its layer has products that do not.
    """

    op: str
    axes: tuple[str, ...]
    tensor_bytes: float
    times: float
    why: str
    waits: bool = True
    odd: bool = False
    weight: str = ""
    leaves_work: bool = False

    def on(self, kind: str) -> Transfer:
        """Return what a machine of `kind` makes of it.

        XLA puts odd numbers of rows together on a TPU by a sum of arrays that are zero but for a
        shard.
        """
        return self._replace(op="all_reduce") if self.odd and kind == "tpu" else self
