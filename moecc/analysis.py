"""Analyses: facts read from a graph without changing it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from moecc.errors import InputError, Problem
from moecc.ir.conventions import DECODER_TOKENS, LOGITS, TOKENS
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.attention import LENGTH_SCALINGS, RopeOp
from moecc.ir.ops.contraction import ProductOp
from moecc.ir.ops.elementwise import ConstantOp
from moecc.ir.traits import Cost, Role, RowMove
from moecc.ir.unroll import users_within

# Find feed-forward blocks by dataflow, not by parameter names.
#
# A block goes from the model's width to an inner axis and back: one or more contractions of one
# value with parameters, elementwise operations that are not all linear, a contraction over the
# inner axis with a parameter, and possibly a bias.  Nothing inside mixes token axes, its parameters
# have no token axis, and no inner value is used outside the block.

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})(?:\.|$)")


def layer_number(loc: str) -> int | None:
    """Return the number of the layer that a location names, or None."""
    match = _LAYER.search(loc)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class FFNBlock:
    """A feed-forward block.

    Attributes:
      loc: its location in the model, ``layers.3.ffn``.
      output: the result, with the axes of `x`.
      ups: the contractions of `x` with parameters, to the inner axis.
      down: the contraction back.
      nodes: all nodes of the block in order, `ups`, `down` and an output bias included.
      outer: the name of the model's width, ``embed``.
      inner: the name of the inner axis, ``mlp``.
    """

    loc: str
    output: Value
    ups: tuple[Node, ...]
    down: Node
    nodes: tuple[Node, ...]
    outer: str
    inner: str

    @property
    def x(self) -> Value:
        """The block's input, ``[…tokens, embed]``; rewriting an earlier block may change it."""
        return self.ups[0].operands[0]

    @property
    def width(self) -> int:
        """The number of neurons: the size of the inner axis."""
        return self.down.operands[0].type[self.inner].fixed_size

    @property
    def embed(self) -> int:
        """The size of the outer axis."""
        return self.x.type[self.outer].fixed_size

    @property
    def layer(self) -> int | None:
        """The layer number, parsed from the location, or None."""
        return layer_number(self.loc)

    @property
    def params(self) -> tuple[Value, ...]:
        """The parameters of the block without duplicates, in the order of use."""
        return tuple(dict.fromkeys(v for n in self.nodes for v in n.operands if v.is_param))

    def biases_of(self, up: Node) -> tuple[Value, ...]:
        """The bias parameters added directly to the result of `up`."""
        adds = (user for user in up.result.users if _is_bias(user))
        return tuple(dict.fromkeys(v for add in adds for v in add.operands if v.is_param))

    @property
    def output_bias(self) -> Value | None:
        """The bias parameter added to the result of `down`, or None."""
        if self.output is self.down.result:
            return None
        (node,) = self.down.result.users
        return next(v for v in node.operands if v.is_param)

    def degrees(self) -> dict[Value, int | None]:
        """Return the degree of homogeneity of the hidden value in each weight of `ups`.

        A degree d means that a·W for W, and a·b for its bias b, with a > 0, give aᵈ times the
        hidden value; None means that there is no such d, as when the weight's product goes
        through SiLU (lemma L3).
        """
        return {up.operands[1]: self._degree(up.operands[1]) for up in self.ups}

    def _degree(self, weight: Value) -> int | None:
        degree: dict[Value, int | None] = {
            up.result: 1 for up in self.ups if up.operands[1] is weight
        }
        for node in self.nodes:
            if node is self.down:
                break
            if node.result not in degree and any(v in degree for v in node.operands):
                degree[node.result] = _combine(node, degree)
        return degree[self.down.operands[0]]


@dataclass
class RejectedBlock:
    """Why a candidate is not an FFN block: the reason and the location."""

    loc: str
    reason: str

    @property
    def layer(self) -> int | None:
        """The layer number, parsed from the location, or None."""
        return layer_number(self.loc)


@dataclass
class FFNSearch:
    """The FFN blocks of a graph, and the candidates that were rejected."""

    blocks: list[FFNBlock] = field(default_factory=list)
    refusals: list[RejectedBlock] = field(default_factory=list)

    def left_dense(self) -> list[RejectedBlock]:
        """Return the rejected candidates that are the only ones of a dense feed-forward layer."""
        converted = {block.loc for block in self.blocks}
        return [
            block
            for block in self.refusals
            if block.loc.endswith(".ffn")
            and block.loc not in converted
            and block.reason not in (SPARSE, BESIDE_EXPERTS)
        ]


def _combine(node: Node, degree: dict[Value, int | None]) -> int | None:
    carried = [degree.get(v, 0) for v in node.operands]
    degrees = [d for d in carried if d is not None]
    if len(degrees) < len(carried):
        return None
    if _is_bias(node):
        # A bias added directly to the product is scaled with the weight, so it changes no degree.
        is_direct = all(v.is_param or (v.node and v.node.op.is_product) for v in node.operands)
        return max(degrees) if is_direct else None
    combined = node.op.homogeneity.degree(degrees)
    return int(combined) if combined is not None and combined == int(combined) else None


def _is_bias(node: Node) -> bool:
    """Whether `node` adds a parameter to a value."""
    # A norm adds a bias, too, but mixes what it is added to; a difference has a sign.
    added = (v for i, v in enumerate(node.operands) if node.op.role(i) is Role.BIAS)
    return node.op.elementwise and node.op.commutative and any(v.is_param for v in added)


def find_ffn_blocks(graph: Graph) -> FFNSearch:
    """Return the feed-forward blocks of `graph`, first to last, with near misses.

    Blocks never share a node: of two overlapping candidates the first one wins.
    """
    search = FFNSearch()
    order = {node: i for i, node in enumerate(graph)}
    used: set[Node] = set()
    for node in graph:
        block = _block_of(node, order) if _is_projection(node) else None
        if isinstance(block, FFNBlock) and not used.isdisjoint(block.nodes):
            block = RejectedBlock(node.loc, "it overlaps another block, which comes before it")
        if isinstance(block, FFNBlock):
            search.blocks.append(block)
            used.update(block.nodes)
        elif block is not None:
            search.refusals.append(block)
    return search


def _is_projection(node: Node) -> bool:
    """Whether `node` contracts an activation with a parameter over a single axis."""
    if not (node.op.is_product and node.operands[1].is_param):
        return False
    return len(ProductOp.of_node(node).over) == 1


def _block_of(down: Node, order: dict[Node, int]) -> FFNBlock | RejectedBlock | None:
    """Return the block that ends in `down`, a near miss, or None if `down` is no candidate."""
    hidden, weight = down.operands[:2]
    inner = ProductOp.of_node(down).over[0]
    added = [n for n in weight.type.names if n != inner and n not in hidden.type]
    if len(added) != 1 or hidden.node is None:
        return None
    (outer,) = added
    ups, inside, outside = _walk_back(down, outer)
    if not ups:
        return None
    for reason in (*outside, *_why_not(ups, inside, down, outer, inner)):
        return RejectedBlock(down.loc, reason)
    bias = _bias_after(down, outer)
    nodes = tuple(sorted(inside | {down} | ({bias} if bias else set()), key=order.__getitem__))
    return FFNBlock(
        loc=down.loc,
        output=bias.result if bias else down.result,
        ups=tuple(n for n in nodes if n in ups),
        down=down,
        nodes=nodes,
        outer=outer,
        inner=inner,
    )


def _walk_back(down: Node, outer: str) -> tuple[set[Node], set[Node], list[str]]:
    """Return the contractions from `outer` that feed `down`, all nodes between, and problems."""
    ups: set[Node] = set()
    inside: set[Node] = set()
    problems: list[str] = []
    stack = [down.operands[0]]
    while stack:
        value = stack.pop()
        node = value.node
        if value.is_param or node in inside or (node and not node.operands):
            continue
        if node is None:
            problems.append(f"%{value.name} comes in from outside")
        elif _is_projection(node) and node.attrs["over"] == (outer,):
            ups.add(node)
            inside.add(node)
        elif node.mixes or not node.op.liftable:
            problems.append(f"%{value.name} = {node.op.name} is not elementwise")
        else:
            inside.add(node)
            stack.extend(node.operands)
    return ups, inside, problems


ROUTING_AXES = frozenset(("group", "expert", "slot", "choice"))
"""The axes that a block gains when it becomes sparse."""

SPARSE = "it is sparse already"
BESIDE_EXPERTS = "it is parallel to experts, in a layer that is sparse already"


def _why_not(
    ups: set[Node], inside: set[Node], down: Node, outer: str, inner: str
) -> Iterator[str]:
    """Yield why the nodes `inside`, from `ups` to `down`, are not a block."""
    roots = {up.operands[0] for up in ups}
    if len(roots) != 1:
        names = ", ".join(sorted(f"%{v.name}" for v in roots))
        yield f"its contractions take different values: {names}"
    x = next(iter(roots))
    if "expert" in x.type:
        yield SPARSE
    if any(user.op.moves is RowMove.TO_SLOTS for user in x.users):
        yield BESIDE_EXPERTS
    if x.is_param or len(x.type) == 1:
        yield f"it reads %{x.name}, which has no axis of tokens"
    if x.type.by_name.keys() != down.result.type.by_name.keys():
        yield f"it does not map {outer!r} back to {outer!r}"
    for axis in (*x.type.names, inner):
        if axis in ROUTING_AXES:
            yield f"its axis {axis!r} has the name of an axis that routing adds"
    params = {v for n in (*inside, down) for v in n.operands if v.is_param}
    for param in sorted(params, key=lambda v: v.name):
        for axis in param.type.names:
            if axis not in (outer, inner):
                yield f"its parameter %{param.name} also has the axis {axis!r}"
        if not param.type.is_static:
            yield f"the sizes of its parameter %{param.name} are not known: {param.type}"
    if _is_linear(inside, ups):
        yield "it is linear: there is no activation between its contractions"
    for value in (v for node in inside for v in node.results):
        for user in value.users:
            if user is down.graph.terminator:
                yield f"%{value.name} inside it is an output of the graph"
            elif user not in inside and user is not down:
                yield f"%{value.name} inside it is also used by {user.op.name} @{user.loc}"


def _is_linear(inside: set[Node], ups: set[Node]) -> bool:
    """Whether the nodes `inside` are linear in the results of `ups`."""
    hidden = {v for n in inside for v in n.results}
    for node in inside - ups:
        carried = [i for i, v in enumerate(node.operands) if v in hidden]
        if (len(carried) > 1 and not node.op.jointly) or not set(carried) <= set(node.op.linear):
            return False
    return True


def _bias_after(down: Node, outer: str) -> Node | None:
    """Return the node that adds a parameter along `outer` to the result of `down`, or None."""
    user = down.result.only_user
    if user is None or not _is_bias(user):
        return None
    added = (v for v in user.operands if v is not down.result)
    return user if all(v.is_param and v.type.names == (outer,) for v in added) else None


# Parameter groups of sparse models for selective fine-tuning (ST-MoE, section 4.2).

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
    layer = value.loc.rpartition(".")[2]
    if any(entry.is_norm for entry in uses) or any(map(scales_norms, users)):
        yield "norm"
    elif any(entry.cost is Cost.LOOK_UP for entry in uses) or layer == "head":
        yield "embedding"
    elif "attention" in layer:
        yield "attention"
    elif layer.endswith("ffn"):
        yield "ffn"


def scales_norms(node: Node) -> bool:
    """Whether `node` is the scale of norms: one more than what is stored, in gemma."""
    if not node.results:  # the outputs of a graph
        return False
    sum_ = node.results[0]
    uses = [(user, i) for user in sum_.users for i, v in enumerate(user.operands) if v is sum_]
    gains = (user.op.is_norm and user.op.role(i) is Role.GAIN for user, i in uses)
    return node.op.is_sum and bool(uses) and all(gains)


def trainable(graph: Graph) -> dict[str, bool]:
    """Return for every parameter whether it is trained: a mask as ``optax.masked`` takes it.

    The graph's attribute ``frozen`` names the groups that are not (set by the pass ``freeze``);
    without it every parameter is trained.
    """
    attribute = graph.attrs.get(ATTRIBUTE)
    chosen: Mapping[str, Iterable[str]] = attribute if isinstance(attribute, Mapping) else {}
    groups = parameter_groups(graph)
    only, frozen = set(chosen.get("only", ())), set(chosen.get("groups", ()))
    if only:
        return {name: bool(of & only) for name, of in groups.items()}
    return {name: not of & frozen for name, of in groups.items()}


# The head of a graph: what makes logits, apart from what makes the hidden states before it.
#
# Logits of a large vocabulary need not all be in memory at once where the head runs over a chunk of
# tokens at a time.

VOCAB = "vocab"
"""The axis of the logits that the softmax runs over."""


CHUNK_BYTES = 64 << 20
"""Logits of a chunk of tokens take about so much memory on a device, in float32."""


@dataclass(frozen=True)
class OutputHead:
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


def split_head(graph: Graph) -> OutputHead:
    """Return the head of `graph`, of the last values that have the axis of the vocabulary.

    Raises:
      InputError: there are no logits.
    """
    check_trainable(graph)
    logits = graph.outputs[LOGITS]
    of_tokens = set(graph.inputs.values())
    for node in graph:
        if not of_tokens.isdisjoint(node.operands):
            of_tokens.update(node.results)
    inside = _head_nodes(logits, of_tokens)
    nodes = tuple(node for node in graph if node in inside)
    read = dict.fromkeys(v for n in nodes for v in n.operands if v.node not in inside)
    hidden = tuple(v for v in read if v in of_tokens) if nodes else (logits,)
    weights = tuple(v for v in read if v not in of_tokens)
    trunk = tuple(node for node in graph if node not in inside)
    return OutputHead(trunk, nodes, hidden, weights, logits)


def _head_nodes(logits: Value, of_tokens: set[Value]) -> set[Node]:
    """Return the nodes from the first value of a token that has the vocabulary on to `logits`.

    None where something else reads what they make, or one of them mixes tokens.
    """
    head: set[Node] = set()
    stack = [logits]
    while stack:
        value = stack.pop()
        node = value.node
        if node is None or node in head or value not in of_tokens or VOCAB not in value.type:
            continue
        users = [u for v in node.results for u in v.users if u not in head]
        mixes_tokens = any(name in node.mixes for name in value.type.names if name != VOCAB)
        if mixes_tokens or any(u is not node.graph.terminator for u in users):
            return set()
        head.add(node)
        stack.extend(node.operands)
    return head


# Whether the documents of a packed row can be kept apart.

DIFFERENCES = ("causal", "alibi", "relative_buckets", "signed_buckets")
"""The operations that read how far positions are apart, which a place in a row does not change."""


def hides_later(node: Node) -> bool:
    """Whether `node` is a causal mask: no query sees a key behind it.

    A window to both sides is a ``causal``, too, whose queries are shifted ahead by a constant.
    """
    if node.op.name != "causal":
        return False
    query = node.operands[0].node
    if query is None or query.op.name != "add":
        return True
    shifts = [v.node for v in query.operands if v.node is not None and v.node.op.name == "constant"]
    return not any(ConstantOp.of_node(node).value > 0 for node in shifts)


def document_mixtures(graph: Graph, longest: int) -> Iterator[Problem]:
    """Yield what makes a document of a packed row depend on others, so that no row is packed.

    ``pack-segments`` masks the softmax of an attention, and counts the positions of rotary tables
    and of learned ones within documents; what else reads a row is named here.

    Args:
      graph: a model's, unrolled.
      longest: the tokens of a row; of 0, which stand for any number, longrope is not named.
    """
    sequences = [graph.inputs[n] for n in (TOKENS, DECODER_TOKENS) if n in graph.inputs]
    axes = [axis for value in sequences for axis in value.type if axis.name != "batch"]
    tokens = {axis.name for axis in axes}
    lengths = {axis.size for axis in axes if isinstance(axis.size, str)}
    is_shifted: dict[Value, bool] = {}
    weights: set[Value] = set()
    # Experts are numbers: a bound on their rows that counts them is one that documents share.
    states = set(sequences)
    for node in graph:
        name, operands = node.op.name, node.operands
        if name == "rope" and _depends_on_length(RopeOp.of_node(node), longest):
            scaling = node.attrs["scaling"]
            yield _mixture(node, f"rope scaling {scaling} depends on the longest document")
        positions = [value for value in operands if value in is_shifted]
        if name == "positions" and node.attrs["axis"] in tokens:
            is_shifted[node.result] = False
        elif positions and name in ("rename", "add"):
            is_shifted[node.result] = name == "add" or is_shifted[positions[0]]
        elif positions and name not in DIFFERENCES:
            is_read = name == "rope" or node.op.cost is Cost.LOOK_UP
            if not is_read or any(is_shifted[value] for value in positions):
                yield _mixture(node, "positions are counted in a row, not in a document")
        read = [value for value in operands if value in states]
        states.update(value for value in node.results if read and value.type.dtype.is_float)
        over = {
            axis.name for value in read for axis in value.type
            if axis.size in lengths and axis.name in node.op.mixes(operands, node.attrs)
        }  # fmt: skip
        if node.op.is_distribution and over and not over & tokens:
            weights.update(node.results)
        elif any(value in weights for value in operands):
            weights.update(node.results if node.op.elementwise else ())
        elif over - tokens or (over and node.op.is_distribution):
            yield _mixture(node, f"tokens of several documents meet in {name}")


def _depends_on_length(rope: RopeOp, longest: int) -> bool:
    """Whether a rotary table depends on the longest document of a row of `longest` tokens."""
    # A table of dynamic scaling is that of the longest document, at whatever length.
    is_long = rope.scaling == "dynamic" or longest > rope.original_context
    return rope.scaling in LENGTH_SCALINGS and is_long


def _mixture(node: Node, message: str) -> Problem:
    return Problem(message, node.loc, hint="data.packing = false")
