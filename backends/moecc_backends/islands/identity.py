"""What a block computes, whatever element type it is traced in: how it is known in another one.

A function traced with parameters in bfloat16 has the casts and the rounded numbers of bfloat16, and
is the same function of the user's program as in float32.
"""

from __future__ import annotations

import re

import numpy as np

from moecc.types import DType
from moecc_backends.islands.dag import Apply, Input, Node, Product, Weight
from moecc_backends.islands.find import Island, nodes_of

_CASTS = ("wide", "narrow")
_NUMBER = re.compile(r"(?<=#)[^ ;]+")


def identity(island: Island) -> str:
    """Return the computation of a block as text without casts, its numbers in full."""
    return _Speller(island).text()


def same_in(a: str, b: str, dtype: DType) -> bool:
    """Return whether two blocks are the same where their numbers are rounded to `dtype`."""
    return _rounded(a, dtype) == _rounded(b, dtype)


def _rounded(text: str, dtype: DType) -> str:
    def rounded(found: re.Match[str]) -> str:
        with np.errstate(all="ignore"):
            return repr(float(np.asarray(float(found[0])).astype(dtype.numpy)))

    return _NUMBER.sub(rounded, text)


class _Speller:
    """Numbers the values of a block in the order of use, and spells each once."""

    def __init__(self, island: Island) -> None:
        self._island = island
        self._names: dict[object, str] = {}
        self._lines: list[str] = []

    def text(self) -> str:
        self._name(nodes_of(self._island))
        return "; ".join(self._lines)

    def _name(self, node: Node | float) -> str:
        if isinstance(node, float):
            return f"#{node!r}"
        if isinstance(node, Input):
            return "x"
        if isinstance(node, Weight):
            key = (node.view.leaf.name, node.view.steps)
            return self._names.setdefault(key, f"w{len(self._names)}")
        if isinstance(node, Apply) and node.function in _CASTS:
            return self._name(node.operands[0])
        if id(node) not in self._names:
            self._lines.append(self._line(node))
            self._names[id(node)] = f"v{len(self._names)}"
        return self._names[id(node)]

    def _line(self, node: Node) -> str:
        if isinstance(node, Product):
            return f"contract {self._name(node.x)} {self._name(node.weight)}"
        assert isinstance(node, Apply), "a value of a block is a product, or a function"
        return " ".join([node.function, *map(self._name, node.operands)])
