"""How many scores a kernel computes, written into the program beside it.

HLO says nothing of what a kernel of Pallas does.  The scope in which it is traced does: XLA keeps
the names of scopes in the metadata of its instructions.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

import jax

_MARK = "score_pairs_"


def score_pairs_scope(pairs: int) -> AbstractContextManager[object]:
    """Return a scope of kernels that compute, for each head, the scores of `pairs`.

    Args:
      pairs: of a query and a key; those of blocks that are skipped do not count.
    """
    return jax.named_scope(f"{_MARK}{pairs}")


def score_pairs_of(op_name: str) -> int | None:
    """Return the pairs that the scopes of an instruction say; None where they say nothing.

    Args:
      op_name: the name in its metadata.
    """
    found = re.search(rf"{_MARK}(\d+)", op_name)
    return int(found[1]) if found else None
