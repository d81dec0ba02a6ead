"""The catalogue of edits: sound ones keep the function on all data, wrong ones do not always."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from tiers import examples

from moecc.ir import Graph
from moecc.testing.generate import random_graph
from moecc.testing.steps import BLOCKS

from . import sound_weights  # noqa: F401 (its edits are among those of SOUND)
from .judge import difference
from .pairs import apply_edit
from .sound_edits import SOUND, Edit
from .sources import planted_graph
from .wrong_edits import WRONG


@cache
def graph(seed: int) -> Graph:
    if seed % 3 == 0:
        return planted_graph(seed, np.random.default_rng(seed))
    return random_graph(seed, steps=BLOCKS if seed % 3 == 2 else None, max_steps=3)


def has_masks(graph: Graph) -> bool:
    return any(n.op.name in ("mask", "attention") for n in graph.every_node())


def applied(edit: Edit, count: int, *, masked: bool) -> Iterator[tuple[Graph, Graph, int]]:
    """Yield graphs, their edited copies, and a seed.

    Args:
      edit: the edit.
      count: how many graphs.
      masked: whether graphs may have infinite numbers.
    """
    for seed in range(600):
        before = graph(seed)
        if "mask" not in edit.ops and not masked and has_masks(before):
            continue
        edited = apply_edit(before, edit, np.random.default_rng(seed))
        if edited is not None:
            yield before, edited[0], seed
            count -= 1
        if not count:
            return


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_edit_keeps_the_function(name):
    count = 0
    for before, after, seed in applied(SOUND[name], examples(2, 30), masked=False):
        assert difference(before, after, seed, thorough=True) is None
        count += 1
    assert count


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_edit_changes_a_function(name):
    gaps = (
        difference(before, after, seed, thorough=True)
        for before, after, seed in applied(WRONG[name], 40, masked=True)
    )
    assert any(g is not None for g in gaps)
