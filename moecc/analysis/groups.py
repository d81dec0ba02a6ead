"""Parameter groups of sparse models for selective fine-tuning (ST-MoE, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.traits import Cost, Role
from moecc.ir.unroll import users_within

GROUPS = ("all", "moe", "non-moe", "router", "attention", "ffn", "norm", "embedding")
"""The groups; a parameter may belong to several.

``moe`` holds every parameter with an expert axis, the router included; ``non-moe`` is the rest.
``attention`` is self-attention and cross-attention, ``ffn`` the dense feed-forward layers, both
without their norms.  ``embedding`` holds the token table and the output matrix.
"""

ATTRIBUTE = "frozen"
"""The graph attribute that names the frozen groups."""


def parameter_groups(graph: Graph) -> dict[str, frozenset[str]]:
    """Return the groups of every parameter of `graph`, by its name."""
    return {name: frozenset(_groups(value)) for name, value in graph.params.items()}


def _groups(value: Value) -> Iterable[str]:
    yield "all"
    if "expert" in value.type:
        yield "moe"
        if not any("slot" in v.type for n in users_within(value) for v in n.operands):
            yield "router"
        return
    yield "non-moe"
    users = list(users_within(value))
    uses = [node.op for node in users]
    place = value.loc.rpartition(".")[2]
    if any(entry.is_norm for entry in uses) or any(map(scales_norms, users)):
        yield "norm"
    elif any(entry.cost is Cost.LOOK_UP for entry in uses) or place == "head":
        yield "embedding"
    elif "attention" in place:
        yield "attention"
    elif place.endswith("ffn"):
        yield "ffn"


def scales_norms(node: Node) -> bool:
    """Whether `node` is the scale of norms: one more than what is stored, in gemma."""
    if not node.results:  # the outputs of a graph
        return False
    made = node.results[0]
    uses = [(user, i) for user in made.users for i, v in enumerate(user.operands) if v is made]
    gains = (user.op.is_norm and user.op.role(i) is Role.GAIN for user, i in uses)
    return node.op.is_sum and bool(uses) and all(gains)


def trainable(graph: Graph) -> dict[str, bool]:
    """Return for every parameter whether it is trained: a mask as ``optax.masked`` takes it.

    The graph's attribute ``frozen`` names the groups that are not (set by the pass ``freeze``);
    without it every parameter is trained.
    """
    found = graph.attrs.get(ATTRIBUTE)
    chosen: Mapping[str, Iterable[str]] = found if isinstance(found, Mapping) else {}
    groups = parameter_groups(graph)
    only, frozen = set(chosen.get("only", ())), set(chosen.get("groups", ()))
    if only:
        return {name: bool(of & only) for name, of in groups.items()}
    return {name: not of & frozen for name, of in groups.items()}
