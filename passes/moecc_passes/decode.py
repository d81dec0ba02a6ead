"""The pass `decode`: a graph that continues texts, with caches of keys and values."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import cached_property
from typing import Annotated, Literal

from moecc.errors import InputError, Problem, raise_problems
from moecc.ir.arrays import Array
from moecc.ir.builder import Builder
from moecc.ir.conventions import DECODER_TOKENS, LOGITS, TOKENS
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.slots import operands_by_word
from moecc.ir.structure import infer_again
from moecc.rewrite import P, fits
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.support.lazy import np
from moecc.types import I32, Axis, TensorType
from moecc_passes.cleanup import DcePass
from moecc_passes.fuse import CAUSAL, MASK, RENAMED
from moecc_passes.routed import NO_ATTENTION
from moecc_passes.specialize import reassign_slots

# What the values of a graph depend on, and on which side of an attention they are.
#
# A decoder has tokens along one axis.  Queries have that axis.  Keys and values have it under
# another name, since an attention meets its sequence twice; the renaming is where the two sides
# part.

POSITIONS_PATTERN = P.positions(P.any("like"), axis=P.attr("axis"))


class Dependence(IntEnum):
    """What a value depends on at most, in the order in which one outweighs another."""

    FIXED = 0
    """Parameters and constants."""
    ENCODED = 1
    """Inputs besides the tokens that are continued: those of an encoder."""
    PLACE = 2
    """The number of the tokens alone: their positions."""
    DATA = 3
    """The tokens."""


@dataclass
class Sides:
    """What is known of the values of a graph.

    Attributes:
      graph: the graph.
      tokens: the input that is continued, ``[batch, seq]``.
      axis: the axis along which it is.
      kinds: what each value depends on.
      keys: the axes of each value along which it has tokens as keys.
    """

    graph: Graph
    tokens: Value
    axis: str
    kinds: dict[Value, Dependence] = field(default_factory=dict)
    keys: dict[Value, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, tokens: Value) -> Sides:
        """Classify all values of `graph`."""
        sides = cls(graph, tokens, tokens.type.names[-1])
        sides.kinds.update(dict.fromkeys(graph.params.values(), Dependence.FIXED))
        sides.kinds.update(dict.fromkeys(graph.inputs.values(), Dependence.ENCODED))
        sides.kinds[tokens] = Dependence.DATA
        for node in graph:
            kind, keys = sides._kind(node), sides._keys(node)
            for value in node.results:
                sides.kinds[value] = kind
                sides.keys[value] = keys & set(value.type.names)
        return sides

    def is_query(self, value: Value) -> bool:
        """Whether `value` has an element for each token, by the name that the tokens have."""
        return self.kinds[value] >= Dependence.PLACE and self.axis in value.type

    def is_key(self, value: Value) -> bool:
        """Whether `value` has tokens as keys, and not as queries."""
        return bool(self.keys.get(value)) and not self.is_query(value)

    def met(self, node: Node) -> Iterator[tuple[int, Value]]:
        """Yield the operands of `node` that are keys and meet queries there, or one another."""
        keys = [(i, v) for i, v in enumerate(node.operands) if self.is_key(v)]
        queries = any(map(self.is_query, (*node.operands, *node.results)))
        for number, value in keys:
            if queries or self.keys[value] & set(node.mixes):
                yield number, value

    def encoded(self, node: Node) -> Iterator[tuple[int, Value]]:
        """Yield the operands of `node` that an encoder makes, if tokens come to it here."""
        if all(self.kinds[v] < Dependence.PLACE for v in node.results):
            return
        for number, value in enumerate(node.operands):
            if self.kinds[value] is Dependence.ENCODED:
                yield number, value

    def is_positions(self, value: Value) -> bool:
        """Whether `value` is 0, 1, 2 … for the tokens."""
        positions = fits(POSITIONS_PATTERN, value.node)
        if positions is None or not self.is_query(positions.value("like")):
            return False
        return value.type.names == (self.axis,)

    def is_key_positions(self, value: Value) -> bool:
        """Whether `value` is 0, 1, 2 … for the tokens as keys."""
        renamed = fits(RENAMED, value.node)
        return renamed is not None and self.is_positions(renamed.value("x"))

    def _kind(self, node: Node) -> Dependence:
        kind = max((self.kinds[v] for v in node.operands), default=Dependence.FIXED)
        positions = fits(POSITIONS_PATTERN, node)
        if positions is None or kind < Dependence.PLACE:
            return kind
        return (
            Dependence.PLACE
            if positions.attr("axis") in (self.axis, *self._of(node))
            else Dependence.FIXED
        )

    def _keys(self, node: Node) -> frozenset[str]:
        keys = self._of(node)
        renamed = fits(RENAMED, node)
        if renamed is None:
            return keys
        old, new = renamed.attr("axis"), renamed.attr("to")
        is_token = old in keys or (old == self.axis and self.is_query(renamed.value("x")))
        return (keys - {old}) | {new} if is_token else keys

    def _of(self, node: Node) -> frozenset[str]:
        return frozenset().union(*(self.keys.get(v, frozenset()) for v in node.operands))


def continued(graph: Graph) -> Value | None:
    """Return the input whose tokens are continued: the decoder's, if there are two, or None.

    Tokens are integers ``[batch, seq]``.
    """
    name = DECODER_TOKENS if DECODER_TOKENS in graph.inputs else TOKENS
    tokens = graph.inputs.get(name)
    is_tokens = tokens is not None and tokens.type.dtype.kind == "int" and len(tokens.type) == 2
    return tokens if is_tokens else None


# Whether a token depends on itself and those before it alone, and what is in the way if not.
#
# Only then is what a token leaves behind (its keys and values) the same whatever follows it. Scores
# must have −∞ where a causal mask hides a key, so that their softmax has zeros there; a product
# over the keys then reads nothing of what is hidden.

LARGEST = P.logsumexp(P.any()) | P.max(P.any())
"""Reductions to which −∞ adds nothing."""

SUM = P.add(P.any(), P.any())
CAST = P.cast(P.any())
ROPE = P.rope(P.any())


class Hidden(Enum):
    """What a value has in the place of keys that a token must not see; false counts as 0."""

    NOTHING = "whatever they are"
    INFINITE = "−∞"
    ZERO = "0"
    OTHER = "made of −∞, such as ∞"


def problems(sides: Sides) -> Iterator[Problem]:
    """Yield why the tokens of a graph cannot be made one by one."""
    yield from _input_problems(sides)
    hidden: dict[Value, Hidden] = {}
    for node in sides.graph:
        if sides.kinds[node.results[0]] < Dependence.PLACE:
            continue
        hidden.update(dict.fromkeys(node.results, _hidden(sides, node, hidden)))
        problem = _problem(sides, node, hidden)
        if problem is not None:
            yield problem


def _input_problems(sides: Sides) -> Iterator[Problem]:
    for name, value in sides.graph.inputs.items():
        if value is sides.tokens:
            continue
        location = f"input {name}"
        if value.type.dtype.kind == "key":
            hint = "specialize{mode=eval} makes a graph without noise"
            yield Problem("the graph draws random numbers", location, hint=hint)
        elif sides.tokens.type.axes[-1] in value.type.axes or sides.tokens.name != DECODER_TOKENS:
            message = f"another input beside {sides.tokens.name} is for tokens that are continued"
            yield Problem(message, location, expected=str(sides.tokens), found=str(value.type))


def _hidden(sides: Sides, node: Node, hidden: dict[Value, Hidden]) -> Hidden:
    """Return what the results of `node` have where a key is hidden."""
    masked = fits(MASK, node)
    if masked is not None and _is_causal(sides, masked.value("keep")):
        return Hidden.INFINITE
    if _is_causal(sides, node.results[0]):
        return Hidden.ZERO
    states = [hidden.get(v, Hidden.NOTHING) for v in node.operands]
    if Hidden.INFINITE in states and _leaves_out(node):
        return Hidden.ZERO
    is_finite = not {Hidden.INFINITE, Hidden.OTHER} & {*states}
    is_linear = len(node.operands) == 1 and node.op.linear == (0,) and not node.mixes
    keeps_zero = node.op.is_scaling or is_linear or fits(CAST, node) is not None
    if Hidden.ZERO in states and keeps_zero and is_finite:
        return Hidden.ZERO
    is_sum = fits(SUM, node) is not None and Hidden.OTHER not in states
    is_kept = masked is not None or is_sum or node.op.keeps_hidden(node.attrs)
    if Hidden.INFINITE in states and is_kept:
        return Hidden.INFINITE
    return Hidden.NOTHING if is_finite or not sides.keys[node.results[0]] else Hidden.OTHER


def _leaves_out(node: Node) -> bool:
    """Return whether an operation makes shares of scores, and none of −∞: the user's are tried."""
    if not node.op.is_distribution or node.op.source is None:
        return node.op.is_distribution
    if len(node.operands) > 1 or len(node.mixes) > 1:
        return False
    every = Array(np.array([0.5, -1.0, 2.0, -np.inf]), node.mixes)
    seen = every.map(lambda data: data[:3])
    try:
        with np.errstate(all="ignore"):
            shares, unmasked = (node.op.evaluate([x], node.attrs)[0].data for x in (every, seen))
    except InputError:
        return False
    return np.allclose(shares, [*unmasked, 0.0])


def _is_causal(sides: Sides, keep: Value) -> bool:
    """Whether `keep` hides the keys after each query."""
    causal = fits(CAUSAL, keep.node)
    return (
        causal is not None
        and sides.is_positions(causal.value("query"))
        and sides.is_key_positions(causal.value("key"))
    )


def _problem(sides: Sides, node: Node, hidden: dict[Value, Hidden]) -> Problem | None:
    keys = [v for v in node.operands if sides.keys.get(v, frozenset()) & set(node.mixes)]
    states = {hidden.get(v, Hidden.NOTHING) for v in keys}
    if node.op.recurs:
        reads_hidden = hidden.get(node.operands[-1]) is not Hidden.ZERO
    elif node.op.is_product:
        reads_hidden = Hidden.ZERO not in states or not states <= {Hidden.ZERO, Hidden.NOTHING}
    else:
        reduces = node.op.is_distribution or fits(LARGEST, node) is not None
        reads_hidden = states != {Hidden.INFINITE} or not reduces
    if keys and reads_hidden:
        return Problem(
            "this attention is not causal: a token would depend on those after it",
            where(node),
            expected="scores that a causal mask hides before their softmax",
            hint="only a decoder continues a text token by token",
        )
    if any(sides.is_query(v) for v in node.operands) and _mixes_tokens(sides, node):
        return Problem(
            "tokens meet otherwise than by a causal attention",
            where(node),
            hint="moecc run takes the whole text at once",
        )
    strange = [
        v
        for _, v in sides.met(node)
        if sides.kinds[v] is Dependence.PLACE and not sides.is_key_positions(v)
    ]
    if strange:
        return Problem(
            f"%{strange[0].name} is made of the positions of all tokens",
            where(node),
            expected="positions renamed, or what is made of tokens",
        )
    return None


def _mixes_tokens(sides: Sides, node: Node) -> bool:
    """Whether elements of several tokens meet in `node`, or its results lose track of them."""
    if node.op.moves is not None or (node.op.assigns_slots and not node.op.chooses):
        return False
    if sides.is_positions(node.results[0]) or fits(ROPE, node) is not None:
        return False
    renamed = any(sides.keys.get(v) for v in node.results)
    lost = not any(sides.is_query(v) for v in node.results) and not renamed
    return sides.axis in node.mixes or lost


# The rewrite: caches where keys meet queries, inputs for what an encoder makes, and positions.

POSITIONS, KEY_POSITIONS, START = "positions", "key_positions", "start"
CACHE, MEMORY = "cache", "memory"

CAPACITY = "C"
"""The size of a cache."""

BOUNDED = P.assign_slots(P.any(), ..., slots="capacity")


@dataclass
class Rewriter:
    """Turns a graph whose tokens see none after them into one that takes them as they come.

    Attributes:
      sides: what is known of its values.
      origin: the origin of new nodes.
      caches: the inputs that hold keys and values of earlier tokens, by the value that they extend.
    """

    sides: Sides
    origin: str
    caches: dict[Value, Value] = field(default_factory=dict)
    memories: dict[Value, Value] = field(default_factory=dict)
    touched: list[Node] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.sides.graph

    @cached_property
    def _normalised(self) -> set[str]:
        """The axes of attention weights."""
        return {name for node in self.graph if node.op.is_distribution for name in node.mixes}

    def problems(self) -> Iterator[Problem]:
        """Yield the names that the graph has given to inputs already."""
        for name in (POSITIONS, KEY_POSITIONS, START):
            if name in self.graph.inputs:
                present = f"the input {name}"
                yield Problem("the graph decodes already, or is packed", found=present)

    def keep(self, outputs: dict[str, Value]) -> None:
        """Make `outputs` the only ones."""
        for name, value in outputs.items():
            self.graph.set_output(name, value)
        for name in [n for n in self.graph.output_names if n not in outputs]:
            self.graph.drop_output(name)

    def encoded(self) -> dict[str, Value]:
        """Return by name what tokens read of what an encoder makes."""
        names: dict[Value, str] = {}
        for node in self.graph:
            for _, value in self.sides.encoded(node):
                if value not in names:
                    names[value] = self._name(MEMORY, node, value, names.values())
        return {name: value for value, name in names.items()}

    def decode(self) -> None:
        """Rewrite the graph."""
        encoded = {value: name for name, value in self.encoded().items()}
        cached: dict[Value, Value] = {}
        for node in list(self.graph):
            meets = list(self.sides.met(node))
            for number, value in self.sides.encoded(node):
                self._replace(node, number, self._memory(value, encoded[value]))
            for number, value in meets:
                if self.sides.kinds[value] is Dependence.DATA:
                    if value not in cached:
                        cached[value] = self._extended(node, value)
                    self._replace(node, number, cached[value])
                else:
                    # The positions of the tokens in the caches, ``[batch,
                    # kv_seq]``.
                    (axis,) = self.sides.keys[value]
                    names = {
                        v.type.names[-1]: n
                        for n, v in self.graph.inputs.items()
                        if KEY_POSITIONS in n
                    }
                    name = names.get(axis) or (
                        KEY_POSITIONS if not names else f"{KEY_POSITIONS}.{axis}"
                    )
                    self._replace(
                        node, number, self._input(name, self._of_tokens(Axis(axis, CAPACITY)))
                    )
        self._take_positions()
        infer_again(self.graph, self.touched)
        for updated in cached.values():
            update = updated.node
            assert update is not None, "an update of a cache"
            self.graph.set_output(update.operands[0].name, updated)

    def unbound(self) -> list[str]:
        """Give every choice a slot, and return where a capacity bounded them before."""
        bounded = [node for node in self.graph if fits(BOUNDED, node) is not None]
        locations = []
        for node in bounded:
            operands = operands_by_word(node.operands, node.attrs)
            remaining = {w: v for w, v in operands.items() if w != "priority"}
            locations.append(node.loc)
            attrs = {"slots": "ragged", "groups": 1, "group_size": 0, "capacity_factor": 0.0}
            reassign_slots(node, remaining, attrs)
        return locations

    def _replace(self, node: Node, number: int, value: Value) -> None:
        node.set_operand(number, value)
        self.touched.append(node)

    def _extended(self, node: Node, value: Value) -> Value:
        """Return the keys or values of all tokens: those of a cache, and then `value`."""
        (axis,) = self.sides.keys[value]
        name = self._name(CACHE, node, value, self.graph.inputs)
        cache = self._input(name, _cached(value.type, axis, CAPACITY))
        self.caches[value] = cache
        builder = Builder(self.graph, loc=node.loc, origin=self.origin, before=node)
        start = self._input(START, TensorType(I32, ()))
        return builder.update_slice(cache, value, start, axis=axis, name=name.rsplit(".", 1)[-1])

    def _memory(self, value: Value, name: str) -> Value:
        self.memories[value] = self._input(name, TensorType(value.type.dtype, value.type.axes))
        return self.memories[value]

    def _take_positions(self) -> None:
        """Read the positions of tokens from an input, in place of counting from 0."""
        for node in list(self.graph):
            if self.sides.kinds.get(node.results[0]) and self.sides.is_positions(node.results[0]):
                positions = self._input(POSITIONS, self._of_tokens(self.sides.tokens.type.axes[-1]))
                self.touched += node.result.users
                node.replace_by(positions)

    def _of_tokens(self, axis: Axis) -> TensorType:
        batch = self.sides.tokens.type.axes[:-1]
        return TensorType(I32, (*batch, axis))

    def _input(self, name: str, type: TensorType) -> Value:
        """Return an input, which is added if it is missing."""
        if name in self.graph.inputs:
            return self.graph.inputs[name]
        if name in self.graph:
            self.graph.rename(self.graph.value(name), self.graph.fresh(name))
        return self.graph.input(name, type)

    def _name(self, prefix: str, node: Node, value: Value, used_names: Container[str]) -> str:
        """Return the name of a cache: of keys where scores are made, of values where they weigh."""
        is_mask = value.type.dtype.kind == "bool"
        is_weighed = self._normalised & set(node.mixes) & set(value.type.names)
        part = "mask" if is_mask else "values" if is_weighed else "keys"
        name = f"{prefix}.{node.loc}.{part}" if node.loc else f"{prefix}.{part}"
        number, unique = 1, name
        while unique in used_names:
            number += 1
            unique = f"{name}{number}"
        return unique


def _cached(type: TensorType, axis: str, size: str) -> TensorType:
    """Return the type of a cache: tokens next to the innermost axis, as products read them."""
    axes = [a for a in type.axes if a.name != axis]
    return TensorType(type.dtype, (*axes[:-1], Axis(axis, size), *axes[-1:]))


# The pass ``decode``: continue texts token by token.

STRETCHED = P.rope(P.any(), scaling=lambda s: s in ("dynamic", "longrope"))

STEPS = "other inputs; step by step the logits of all tokens"
DROPS = "no capacity drops a token"
STRETCHES = "keys are rotated once, as the length at that time wants"


@dataclass(frozen=True)
class DecodePass(Pass):
    """Take tokens as they come, and keep the keys and values of those before in caches.

    Before::

        input %tokens : i32[batch=B, seq=S]
        %positions = positions %tokens {axis=seq}
        %seen = causal %positions, %far : pred[seq=S, kv_seq=S]
        %scores = contract %q, %k {over=head_dim} : f32[batch=B, seq=S, head=4, kv_seq=S]
        %mixed = contract %weights, %v {over=kv_seq}
        output logits = %logits

    After::

        input %tokens : i32[batch=B, seq=S]                    # new ones, one or more
        input %positions : i32[batch=B, seq=S]                 # theirs, of each text
        input %key_positions : i32[batch=B, kv_seq=C]          # of what is in the caches
        input %start : i32[]                                   # where in the caches they go
        input %cache.layers.0.attention.keys : f32[batch=B, head=4, kv_seq=C, head_dim=8]
        %seen = causal %positions, %key_positions : pred[batch=B, seq=S, kv_seq=C]
        %keys = update_slice %cache.layers.0.attention.keys, %k, %start {axis=kv_seq}
        %scores = contract %q, %keys {over=head_dim} : f32[batch=B, seq=S, head=4, kv_seq=C]
        %mixed = contract %weights, %values {over=kv_seq}
        output logits = %logits
        output cache.layers.0.attention.keys = %keys

    A cache is where keys or values meet queries; what makes them works on new tokens alone.  A
    place of a cache with nothing in it has a position that no token reaches, and so has padding:
    texts of a batch may have different lengths, padded on either side.

    Of an encoder-decoder ``part=encode`` keeps what the encoder makes for the decoder's tokens,
    keys and values of cross-attention: outputs ``memory.…``, which are inputs of ``part=decode``.

    The promise: tokens that are given one after the other, or several at a time, have the logits
    that the whole text has at once.  A graph in which a token depends on later ones is rejected.
    """

    name = "decode"
    summary = "continue texts token by token, with caches of keys and values"
    must_match = True
    preserves = Preserves("approximate", STEPS)

    part: Annotated[
        Literal["decode", "encode"], "graph to make: of the decoder's tokens, or of the encoder"
    ] = "decode"

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite the graph.

        Raises:
          InputError: there are no tokens, or a token depends on those after it.
        """
        tokens = continued(graph)
        if tokens is None or LOGITS not in graph.outputs:
            raise InputError(
                "the graph continues no text",
                expected=f"the input tokens, i32[batch, seq], and the output {LOGITS}",
                found=f"{', '.join(graph.inputs)}; {', '.join(graph.outputs)}",
            )
        values = [*graph.inputs.values(), *(v for node in graph for v in node.results)]
        if any(axis.size == CAPACITY for v in values for axis in v.type.axes):
            raise InputError(f"{CAPACITY} is a size of the graph", hint="caches have the size C")
        dropped = [name for name in graph.outputs if name != LOGITS]
        # What only other outputs need is left out before the graph is judged.
        Rewriter(Sides.of(graph, tokens), self.name).keep({LOGITS: graph.outputs[LOGITS]})
        _clean(graph, inputs=False)
        rewriter = Rewriter(Sides.of(graph, graph.inputs[tokens.name]), self.name)
        obstacles = [*rewriter.problems(), *problems(rewriter.sides)]
        raise_problems(obstacles)
        remarks = [Remark(f"output {name}", "is no part of a step") for name in dropped]
        if self.part == "encode":
            memories = rewriter.encoded()
            if memories:
                rewriter.keep(memories)
            counts = {"memories": len(memories)}
        else:
            rewriter.decode()
            memory_count = len(rewriter.memories) if rewriter.caches else 0
            counts = {"caches": len(rewriter.caches), "memories": memory_count}
        stats = {name: count for name, count in counts.items() if count}
        _clean(graph)
        if not stats:
            return PassResult(True, 0, near_misses=[NO_ATTENTION], remarks=remarks)
        reasons = [STEPS]
        if self.part == "decode":
            differences = list(_differences(graph, rewriter.unbound()))
            remarks += [remark for remark, _ in differences]
            reasons += dict.fromkeys(reason for _, reason in differences)
        preserves = Preserves("approximate", "; ".join(reasons))
        return PassResult(True, sum(stats.values()), stats, remarks, preserves=preserves)

    def measure(self, before: Graph, after: Graph, seed: int) -> float | None:
        """Return the error of the logits of `before` token by token."""
        from moecc.testing.data import inputs_for, params_for
        from moecc.testing.laws import step_error

        tokens = continued(before)
        if tokens is None or self.part == "encode":
            return None
        inputs = inputs_for(before, seed)
        parts = [1] * inputs[tokens.name].shape[1]
        return step_error(before, params_for(before, seed), inputs, parts)


def _differences(graph: Graph, unbound: Iterable[str]) -> Iterator[tuple[Remark, str]]:
    """Yield what a step computes otherwise than the whole text, and the reason for the promise."""
    for location in unbound:
        yield Remark(location, "its capacity drops no token of a step"), DROPS
    for node in graph:
        if fits(STRETCHED, node) is not None:
            yield Remark(where(node), STRETCHES), STRETCHES


def _clean(graph: Graph, *, inputs: bool = True) -> None:
    """Erase what no output depends on."""
    DcePass().apply(graph, Context())
    for name in [n for n, v in graph.inputs.items() if inputs and not v.users]:
        graph.erase_input(name)
