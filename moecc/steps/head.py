"""The head of a graph: what makes logits, apart from what makes the hidden states before it.

Logits of a large vocabulary need not all be in memory at once where the head runs over a chunk of
tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value

LOGITS = "logits"
"""The output that is trained."""

VOCAB = "vocab"
"""The axis of the logits that the softmax runs over."""


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


def check_trainable(graph: Graph) -> None:
    """Raise InputError if `graph` has no logits to train."""
    if LOGITS not in graph.output_names or VOCAB not in graph.outputs[LOGITS].type:
        raise InputError(
            "a training step needs logits",
            where=graph.name,
            expected=f"an output called {LOGITS}, with an axis {VOCAB}",
            found=", ".join(graph.output_names),
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
