"""The head of a graph: what makes logits, apart from what makes the hidden states before it.

Logits of a large vocabulary need not all be in memory at once where the head runs over a chunk of
tokens at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value

LOGITS = "logits"
"""The output that is trained."""

VOCAB = "vocab"
"""The axis of the logits that the softmax runs over."""


CHUNK_BYTES = 64 << 20
"""Logits of a chunk of tokens take about so much memory on a device, in float32."""


@dataclass(frozen=True)
class Head:
    """A graph, split where its values get the axis of the vocabulary.

    Attributes:
      trunk: the nodes before the head, and those beside it, in order.
      nodes: the nodes of the head, in order; they work on each token by itself.
      hidden: what the head reads that depends on tokens.
      weights: what it reads that depends on parameters alone.
      logits: what it makes.
    """

    trunk: tuple[Node, ...]
    nodes: tuple[Node, ...]
    hidden: tuple[Value, ...]
    weights: tuple[Value, ...]
    logits: Value

    @property
    def is_cut(self) -> bool:
        """Whether it may run over a chunk of tokens at a time."""
        axes = [name for name in self.logits.type.names if name != VOCAB]
        return bool(self.nodes) and all(n in v.type for v in self.hidden for n in axes)


def chunk_count(logits_bytes: float, weights_bytes: float, chunk_bytes: int) -> int:
    """Return in how many chunks the tokens of a head are cut.

    Chunks add up their gradients of the weights in float32.  Where these take as much as all logits
    do, because there are no more tokens than the width of the model, nothing is saved.

    Args:
      logits_bytes: of all logits on a device, in float32.
      weights_bytes: of the weights of the head there, in float32.
      chunk_bytes: of the logits of a chunk, about.
    """
    if logits_bytes <= weights_bytes:
        return 1
    return max(1, math.ceil(logits_bytes / chunk_bytes))


def is_trainable(graph: Graph) -> bool:
    """Whether `graph` has logits to train."""
    return LOGITS in graph.output_names and VOCAB in graph.outputs[LOGITS].type


def reads_tokens(graph: Graph) -> bool:
    """Whether `graph` takes numbers of tokens: the pass ``tie-head`` can make logits of it."""
    return any(not value.type.dtype.is_float for value in graph.inputs.values())


def check_trainable(graph: Graph, hint: str | None = None) -> None:
    """Raise InputError if `graph` has no logits to train, with the way out that a caller knows."""
    if not is_trainable(graph):
        raise InputError(
            "a training step needs logits",
            where=graph.name,
            expected=f"an output called {LOGITS}, with an axis {VOCAB}",
            found=", ".join(graph.output_names),
            hint=hint,
        )


def split_head(graph: Graph) -> Head:
    """Return the head of `graph`, of the last values that have the axis of the vocabulary.

    Raises:
      InputError: there are no logits.
    """
    check_trainable(graph)
    logits = graph.outputs[LOGITS]
    of_tokens = _of_inputs(graph)
    inside = _head_nodes(logits, of_tokens)
    nodes = tuple(node for node in graph if node in inside)
    read = dict.fromkeys(v for n in nodes for v in n.operands if v.node not in inside)
    hidden = tuple(v for v in read if v in of_tokens) if nodes else (logits,)
    weights = tuple(v for v in read if v not in of_tokens)
    trunk = tuple(node for node in graph if node not in inside)
    return Head(trunk, nodes, hidden, weights, logits)


def _of_inputs(graph: Graph) -> set[Value]:
    """Return the values that depend on inputs."""
    found = set(graph.inputs.values())
    for node in graph:
        if not found.isdisjoint(node.operands):
            found.update(node.results)
    return found


def _head_nodes(logits: Value, of_tokens: set[Value]) -> set[Node]:
    """Return the nodes from the first value of a token that has the vocabulary on to `logits`.

    None where something else reads what they make, or one of them mixes tokens.
    """
    found: set[Node] = set()
    left = [logits]
    while left:
        value = left.pop()
        node = value.node
        if node is None or node in found or value not in of_tokens or VOCAB not in value.type:
            continue
        others = [u for v in node.results for u in v.users if u not in found]
        if any(u is not node.graph.terminator for u in others) or _mixes_tokens(node, value):
            return set()
        found.add(node)
        left.extend(node.operands)
    return found


def _mixes_tokens(node: Node, value: Value) -> bool:
    return any(name in node.mixes for name in value.type.names if name != VOCAB)
