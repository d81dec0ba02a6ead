"""Passes that prepare a graph for training: freeze, tie-head, force-balance, pack-segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from moecc.analysis import ATTRIBUTE, document_mixtures, parameter_groups, trainable
from moecc.errors import InputError, Problem, raise_problems
from moecc.families.heads import LOGITS as HEAD_LOGITS
from moecc.families.heads import MASKED_LM, POOLED
from moecc.ir.builder import Builder
from moecc.ir.conventions import DECODER_TOKENS, HIDDEN, LOGITS, TOKENS
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.routing import RouteOp
from moecc.ir.ops.slots import operands_by_word
from moecc.ir.structure import infer_again
from moecc.ir.traits import Cost
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves, Remark, advice
from moecc.rewrite.pattern import P, fits
from moecc.types import TensorType
from moecc_passes.routed import (
    NO_ATTENTION,
    NOTHING_ROUTED,
    RoutedLayer,
    routed_layers,
    weighted_values,
)
from moecc_passes.specialize import reassign_slots

Group = Literal["all", "moe", "non-moe", "router", "attention", "ffn", "norm", "embedding"]


@dataclass(frozen=True)
class FreezePass(Pass):
    """Mark parameters, by groups, that an optimiser must not update.

    Before::

        attr family = "mixtral"

    After ``freeze{groups=moe}``::

        attr family = "mixtral"
        attr frozen = {"groups": ["moe"], "only": []}

    ``moecc.analysis.trainable`` makes the mask from it.  ST-MoE found that training all but
    the experts is as good as training everything, and training the experts alone much worse.
    """

    name = "freeze"
    summary = "freeze groups of parameters"
    must_match = True
    takes_rolled = True
    preserves = EXACT

    groups: Annotated[tuple[Group, ...], "the frozen groups"] = ()
    only: Annotated[tuple[Group, ...], "the only trained groups"] = ()

    def validate(self) -> list[Problem]:
        """Return a problem unless exactly one of the options is set."""
        if bool(self.groups) != bool(self.only):
            return []
        stated = "both" if self.groups else "neither"
        return [
            Problem(
                "state either the frozen groups or the only trained ones",
                "groups",
                "groups or only",
                stated,
                "groups=moe is the paper's way to save memory",
            )
        ]

    def lints(self) -> list[Problem]:
        """Return what the paper found to be worse."""
        if self.only == ("moe",):
            return [
                advice(
                    "the experts alone are trained, which is much worse",
                    "only",
                    "section 4.2",
                    expected="groups=moe",
                    value="moe",
                )
            ]
        if "router" in self.groups and not {"moe", "all"} & set(self.groups):
            return [
                advice(
                    "experts are trained and their router is frozen, so that no loss can "
                    "balance them",
                    "groups",
                    "appendix A",
                    expected="groups=moe",
                    value="router",
                )
            ]
        return []

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Set the attribute of the graph, replacing an earlier one."""
        before = graph.attrs.get(ATTRIBUTE)
        there = set().union(*parameter_groups(graph).values()) if graph.params else set()
        graph.attrs[ATTRIBUTE] = {"groups": list(self.groups), "only": list(self.only)}
        mask = trainable(graph)
        for group in (*self.groups, *self.only):
            if group not in there:
                ctx.remark(Remark("", f"no parameter is in the group {group!r}"))
        if mask and not any(mask.values()):
            ctx.remark(Remark("", "nothing is left to train"))
        if self.only == ("moe",):
            ctx.remark(
                Remark("", "training the experts alone was much worse in ST-MoE (section 4.2)")
            )
        frozen = len(mask) - sum(mask.values())
        stats = {"parameters": len(mask), "frozen": frozen}
        return PassResult(graph.attrs[ATTRIBUTE] != before, len(mask), stats)


# The pass ``tie-head``: logits of an encoder without a head, by its embedding.


@dataclass(frozen=True)
class TieHeadPass(Pass):
    """Make logits of the hidden states by the table that looks tokens up.

    Before::

        %v = embedding %table, %tokens {axis=vocab}
        output hidden = %hidden

    After::

        output hidden = %hidden
        %logits = contract %hidden, %table {over=embed} : f32[batch=B, seq=S, vocab=30522]
        output logits = %logits

    An encoder that is stored without a head is trained on masked tokens so (Press and Wolf 2017);
    the head adds no parameter and is not exported.  A graph with the head of its masked language
    model keeps that one, whose logits are ``head.logits``.
    """

    name = "tie-head"
    summary = "add logits computed by the tied embedding"

    only: Annotated[bool, "remove hidden states and heads from the outputs"] = False

    @property
    def preserves(self) -> Preserves:
        """Exact, where the outputs stay."""
        return Preserves("approximate", "an output is left out") if self.only else EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the output ``logits``, unless there is one.

        Raises:
          InputError: the graph has no hidden states, or no table of tokens that suits them.
        """
        if LOGITS in graph.output_names:
            return PassResult(changed=False)
        stated = graph.outputs.get(HEAD_LOGITS) if graph.attrs.get("head") == MASKED_LM else None
        graph.set_output(LOGITS, self._tied(graph) if stated is None else stated)
        for name in (HIDDEN, HEAD_LOGITS, POOLED) if self.only else ():
            if name in graph.output_names:
                graph.drop_output(name)
        return PassResult(changed=True, matched=1)

    def _tied(self, graph: Graph) -> Value:
        hidden = graph.outputs.get(HIDDEN)
        # The parameter that looks tokens up.
        tokens = graph.inputs.get(TOKENS)
        users = [] if tokens is None else list(tokens.users)
        tables = (
            u.operands[0] for u in users if u.op.cost is Cost.LOOK_UP and u.operands[0].is_param
        )
        table = next(tables, None)
        if hidden is None or table is None:
            raise InputError(
                "the graph has no hidden states and embedding to make logits of",
                expected=f"the output {HIDDEN}, and a table that looks {TOKENS} up",
                found=", ".join(graph.output_names),
            )
        (width,) = (n for n in table.type.names if n in hidden.type)
        builder = Builder(graph, loc="head", origin=self.name)
        return builder.contract(hidden, table, over=width, name=LOGITS)


# The pass ``force-balance``: experts in turn, whatever the router says, for timing alone.


@dataclass(frozen=True)
class ForceBalancePass(Pass):
    """Let tokens take experts in turn: every expert has as many rows, whatever its router says.

    Before::

        %e, %g = route %l {top_k=2} : i32[batch=B, seq=S, choice=2], f32[batch=B, seq=S, choice=2]

    After::

        %e, %g = route %l {top_k=2} : …
        %n = positions %e {axis=seq} : i32[seq=S]
        %t = hash_experts %n {experts=8, top_k=2, hash=modulo} : i32[seq=S, choice=2]
        %f = broadcast %t, %e : i32[batch=B, seq=S, choice=2]    # in place of %e

    A router that has not learned yet sends tokens unevenly; the time of a step then says little
    about that of a trained model.  The gates are still those of the router, so that all of its
    work is done.
    """

    name = "force-balance"
    summary = "assign experts to tokens in turn, to time a step"
    must_match = True

    preserves = Preserves("approximate", "tokens go to experts in turn, not to those of the router")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Replace the choices of every router; experts that choose are balanced as they are."""
        layers = routed_layers(graph)
        changed = 0
        for layer in layers:
            if layer.route is None:
                ctx.remark(Remark(layer.name, "is left: its router does not choose"))
                continue
            _force(layer, layer.route)
            changed += 1
        missing = [] if layers else [NOTHING_ROUTED]
        return PassResult(changed > 0, len(layers), {"layers": changed}, near_misses=missing)


def _force(layer: RoutedLayer, route: Node) -> None:
    attrs, chosen = RouteOp.of_node(route), route.results[0]
    (experts,) = (a.size for a in route.operands[0].type if a.name == attrs.axis)
    assert isinstance(experts, int), "the number of experts is known"
    users = list(chosen.users)
    builder = Builder(route.graph, loc=route.loc, origin="force-balance", before=route._next)
    numbers = builder.positions(chosen, axis=layer.tokens[-1])
    turns = builder.hash_experts(
        numbers, experts=experts, top_k=attrs.top_k, choice=attrs.choice, hash="modulo"
    )
    forced = builder.broadcast(turns, chosen)
    for node in users:
        node.replace_operand(chosen, forced)


# The pass ``pack-segments``: keep documents apart that share a sequence.

POSITIONS = P.positions(P.any())
ROPE = P.rope(P.any(), scaling=P.attr("scaling"))


@dataclass(frozen=True)
class PackSegmentsPass(Pass):
    """Let a token see, and be counted with, those of its own document alone.

    Before::

        input %tokens : i32[batch=B, seq=S]
        %cos, %sin = rope %positions {…}
        %weights = softmax %scores {axis=kv_seq}
        %slots = assign_slots %experts {…}

    After::

        input %tokens : i32[batch=B, seq=S]
        input %segments : i32[batch=B, seq=S]     # the number of the document, 0 for padding
        input %positions : i32[batch=B, seq=S]    # within the document
        %same = same_segment %segments, %keys : pred[batch=B, seq=S, kv_seq=S]
        %cos, %sin = rope %positions {…}
        %weights = softmax (mask %scores, %same) {axis=kv_seq}
        %slots = assign_slots %experts, (less 0, %segments) {… using=(mask)}

    With ``documents=one`` a row has one document and padding behind it: positions stay as they are,
    and what mixes documents otherwise than by attention is left as it is.

    In an encoder-decoder also ``decoder_segments``; the tokens of a document see those of the
    encoder's segment of the same number.  Windows and relative positions within a document are
    what they were.  Without a capacity the documents of a row have the results that each has alone;
    under one they compete for slots.
    """

    name = "pack-segments"
    summary = "mask attention between documents that share a sequence"
    must_match = True
    preserves = Preserves("approximate", "tokens see those of their own segment alone")

    documents: Annotated[Literal["several", "one"], "documents per row"] = "several"

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the inputs and masks.

        Raises:
          InputError: the graph has such inputs already, or tokens of several documents meet in
            another way than attention.
        """
        packing = _Packing(graph)
        several = self.documents == "several"
        problems = [*packing.problems(), *(packing.mixtures() if several else ())]
        raise_problems(problems)
        attentions = packing.attentions()
        if not attentions:
            return PassResult(changed=False, near_misses=[NO_ATTENTION])
        assigners = packing.assigners()
        if several:
            packing.place(packing.positioned())
        for attention in attentions:
            packing.mask(attention)
        for node in assigners:
            packing.assign(node)
        stats = {"attentions": len(attentions), "routed layers": len(assigners)}
        return PassResult(changed=True, matched=len(attentions), stats=stats)


@dataclass(frozen=True)
class _Attention:
    """One attention: its weights, and whether queries and keys are the decoder's."""

    softmax: Node
    axis: str
    query: str
    key: str


class _Packing:
    """Rewrites a graph.

    A sequence is known by the beginning of the names of its inputs: nothing, or ``decoder_``.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        # The values that depend on `start`.
        start = graph.inputs.get(DECODER_TOKENS)
        values: set[Value] = set() if start is None else {start}
        for node in graph:
            if any(value in values for value in node.operands):
                values.update(node.results)
        self._decoder = values
        self._masks: dict[tuple[str, str, str], Value] = {}
        self._valid: dict[str, Value] = {}

    def problems(self) -> Iterator[Problem]:
        """Yield why documents cannot be kept apart."""
        if TOKENS not in self._graph.inputs:
            inputs = ", ".join(self._graph.inputs)
            yield Problem("the graph has no tokens", expected=f"the input {TOKENS}", found=inputs)
            return
        for name in ("segments", "positions"):
            for input_name in (name, f"decoder_{name}"):
                if input_name in self._graph.inputs:
                    yield Problem("the graph is packed already", found=f"the input {input_name}")

    def mixtures(self) -> Iterator[Problem]:
        """Yield where tokens of several documents meet otherwise than by attention."""
        if TOKENS not in self._graph.inputs:
            return
        for node in self._graph:
            if node.op.is_distribution and _axis(node) in self._token_axes:
                yield Problem(
                    "experts read averages of tokens, of whatever document",
                    where(node),
                    hint="routing=token-choice keeps documents apart",
                )
        # How long a row is, is not known here: moecc train asks again, of longrope.
        yield from document_mixtures(self._graph, longest=0)

    @property
    def _token_axes(self) -> tuple[str, ...]:
        """The axes of the tokens of a document, outermost first but for the batch."""
        return self._graph.inputs[TOKENS].type.names[1:]

    def attentions(self) -> list[_Attention]:
        """Return the attentions of the graph."""
        attentions = []
        for node in self._graph:
            values = weighted_values(node)
            if values is not None and set(self._token_axes) <= set(node.result.type.names):
                query, key = self._sequence(node.result), self._sequence(values)
                attentions.append(_Attention(node, _axis(node), query, key))
        return attentions

    def positioned(self) -> list[Node]:
        """Return what reads absolute positions, rotary tables and learned ones."""
        counted = (node for node in self._graph if fits(POSITIONS, node) is not None)
        users = (user for node in counted for user in node.result.users)
        return [n for n in users if fits(ROPE, n) is not None or n.op.cost is Cost.LOOK_UP]

    def assigners(self) -> list[Node]:
        """Return what assigns slots, and counts padding yet."""
        return [
            node
            for node in self._graph
            if node.op.assigns_slots and "mask" not in operands_by_word(node.operands, node.attrs)
        ]

    def place(self, nodes: list[Node]) -> None:
        """Count the positions of `nodes` within documents."""
        for node in nodes:
            for number, value in enumerate(node.operands):
                if fits(POSITIONS, value.node) is not None:
                    node.set_operand(number, self._input(self._sequence(value), "positions"))
        infer_again(self._graph, nodes)

    def mask(self, attention: _Attention) -> None:
        """Let an attention see its own document alone."""
        node = attention.softmax
        builder = Builder(self._graph, loc=node.loc, origin=self._origin, before=node)
        node.set_operand(0, builder.mask(node.operands[0], self._same(attention)))

    def assign(self, node: Node) -> None:
        """Give no slot to padding."""
        operands = operands_by_word(node.operands, node.attrs)
        operands["mask"] = self._tokens(self._sequence(node.operands[0]))
        reassign_slots(node, operands, {})

    @property
    def _origin(self) -> str:
        return PackSegmentsPass.name

    def _sequence(self, value: Value) -> str:
        return "decoder_" if value in self._decoder else ""

    def _input(self, sequence: str, part: str) -> Value:
        """Return an input of a sequence, which is added if it is missing."""
        name = f"{sequence}{part}"
        if name in self._graph.inputs:
            return self._graph.inputs[name]
        if name in self._graph:
            # A value of the graph gives its name to the input, by which batches know it.
            self._graph.rename(self._graph.value(name), self._graph.fresh(name))
        tokens = self._graph.inputs[f"{sequence}{TOKENS}"]
        return self._graph.input(name, TensorType(tokens.type.dtype, tokens.type.axes))

    def _same(self, attention: _Attention) -> Value:
        """Return which keys are of the document of a query, ``[batch, seq, kv_seq]``."""
        kind = (attention.query, attention.key, attention.axis)
        if kind not in self._masks:
            (axis,) = self._token_axes
            queries, keys = (self._input(s, "segments") for s in kind[:2])
            builder = self._first(attention.query)
            renamed = builder.rename(keys, axis=axis, to=attention.axis)
            self._masks[kind] = builder.same_segment(queries, renamed, name="same")
        return self._masks[kind]

    def _tokens(self, sequence: str) -> Value:
        """Return which tokens are no padding, ``[batch, seq]``."""
        if sequence not in self._valid:
            builder = self._first(sequence)
            zero = builder.constant(value=0.0, dtype="i32")
            segments = self._input(sequence, "segments")
            self._valid[sequence] = builder.less(zero, segments, name="valid")
        return self._valid[sequence]

    def _first(self, sequence: str) -> Builder:
        """Return a builder in front of all nodes, at the location of the embedding."""
        first = next(iter(self._graph))
        tokens = self._graph.inputs[f"{sequence}{TOKENS}"]
        loc = next((user.loc for user in tokens.users), first.loc)
        return Builder(self._graph, loc=loc, origin=self._origin, before=first)


def _axis(node: Node) -> str:
    return str(node.attrs["axis"])
