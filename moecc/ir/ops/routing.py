"""Routing as plain tensors: the experts and gates of each token, and which of them are kept.

``route`` picks experts and gates, ``keep_choices`` is the policy for all but the first,
``hash_experts`` knows the expert from the token alone, and ``within_buffer`` keeps the choices that
have room on the device of their expert.  `moecc.ir.ops.slots` assigns slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import ceil, inf
from typing import TYPE_CHECKING, Literal, get_args

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data
from moecc.ir.conventions import CONVENTIONS, GATES, Score, convention
from moecc.ir.operand import Attrs, Definition, Operand
from moecc.ir.operation import AxisName, AxisNames, Float, Int, Op, Word, Words, operation
from moecc.ir.ops.contraction import normalised
from moecc.ir.ops.elementwise import logistic
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    need_float,
    need_kind,
    no_duplicates,
    no_ragged,
    received,
    same_size,
)
from moecc.ir.ops.slots import operands_by_word
from moecc.ir.traits import OPERAND
from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head, Polynomial, Var
from moecc.types import I32, PRED, Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh

Policy = Literal["all", "none", "threshold", "random"]
"""Policies for choices after the first (ST-MoE, Appendix G)."""

JITTER = 0.01
"""Half the relative distance from the best logit within which sparsemixer counts (PhiMoE)."""


def _of(scores: Data, experts: Data) -> Data:
    return np.take_along_axis(scores, experts, -1)


def _sigmoid_renormalised(scores: Data, experts: Data) -> Data:
    chosen = logistic(_of(scores, experts))
    return np.asarray(chosen / chosen.sum(-1, keepdims=True))


def _sparsemixer(scores: Data, experts: Data) -> Data:
    """Each choice's softmax among the logits near it; earlier choices are excluded."""
    left, gates = scores.copy(), []
    for choice in range(experts.shape[-1]):
        expert = experts[..., choice : choice + 1]
        best = _of(left, expert)
        distance = (best - scores) / np.maximum(np.abs(scores), best)
        near = np.where(distance > 2 * JITTER, -np.inf, left)
        gates.append(_of(normalised(near), expert))
        np.put_along_axis(left, expert, -np.inf, -1)
    return np.concatenate(gates, -1)


SCORES: dict[Score, Callable[[Data], Data]] = {"softmax": normalised, "sigmoid": logistic}
"""The functions of the logits that a routing bias is added to, by the score of the convention."""

GATE_FUNCTIONS: dict[str, Callable[[Data, Data], Data]] = {
    "renormalised": lambda scores, experts: normalised(_of(scores, experts)),
    "softmax": lambda scores, experts: _of(normalised(scores), experts),
    "sigmoid-renormalised": _sigmoid_renormalised,
    "sigmoid": lambda scores, experts: logistic(_of(scores, experts)),
    "sparsemixer": _sparsemixer,
    "ones": lambda scores, experts: np.ones(experts.shape),
}
"""From logits `[…, expert]` and choices `[…, choice]` to gates `[…, choice]`."""


_SPELLED = "\n".join(f"{row.name}: {row.doc}." for row in CONVENTIONS)
_ROUTE_DOC = f"""The k experts with the largest logits, best first, and their gates.

    A tie takes the lowest expert.  The gate conventions are

    {_SPELLED}

    All times `scale`.

    `using=bias` adds an operand `[expert]`: experts are then chosen, and put in order, by
    their score (the sigmoid or softmax of the logits, as the convention has it) plus the bias;
    gates are made of the logits alone (loss-free balancing, Wang et al. 2024). One with the axes
    of the logits is the token's own, and −∞ keeps an expert from being chosen."""


@operation(
    "route",
    "logits",
    doc=_ROUTE_DOC,
    results=("experts", "gates"),
    residual=OPERAND,
    sharding=by_name,
    chooses=True,
    variadic=True,
)
class RouteOp(Op):
    """The k experts with the largest logits, best first, and their gates."""

    top_k = Int("experts per token", pins=True)
    gates = Word("the gate convention", "renormalised", choices=GATES)
    scale = Float("what the gates are multiplied by", 1.0)
    axis = AxisName("the axis of the experts", "expert", pins=True)
    choice = AxisName("the new axis, of size top_k", "choice")
    using = Words("what the further operands are", (), choices=("bias",))
    precision = Word(
        "default: in the type of the run, even bf16", "f32", choices=("default", "f32")
    )

    def infer(self, *operands: Operand) -> tuple[TensorType, ...]:
        logits, k = operands[0].type, self.top_k
        need_float(logits, "the router's logits")
        expert = axis_of(logits, self.axis)
        no_ragged(logits, (expert.name,), "cannot choose")
        if k < 1 or (isinstance(expert.size, int) and k > expert.size):
            raise InputError(
                "top_k is out of range for the experts",
                expected=f"1 <= top_k <= {expert.size}",
                found=str(k),
            )
        gates = convention(self.gates)
        if gates.max_top_k is not None and k > gates.max_top_k:
            defined = " and ".join(map(str, range(1, gates.max_top_k + 1)))
            raise InputError(f"{self.gates} gates are defined for top_k {defined}", found=str(k))
        further = operands_by_word(operands, self.attrs)
        if "bias" in further:
            bias = further["bias"].type
            need_float(bias, "the bias")
            if bias.names != (expert.name,) and set(bias.names) != set(logits.names):
                raise InputError(
                    "the bias has one element per expert, or also per token",
                    expected=str(expert),
                    found=str(bias),
                )
            for axis in bias.axes:
                same_size(logits[axis.name], axis)
            if gates.score is None:
                message = f"{self.gates} gates have no score that a bias could be added to"
                raise InputError(message)
        outer = (a for a in logits.axes if a is not expert)
        axes = no_duplicates((*outer, Axis(self.choice, k)))
        return (TensorType(I32, axes), TensorType(logits.dtype, axes))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (self.axis,)

    def meaning(self, logits: Array, *biases: Array) -> tuple[Array, Array]:
        tokens = tuple(a for a in logits.axes if a != self.axis)
        scores = ranked = logits.to((*tokens, self.axis))
        for bias in biases:
            each = bias.data if len(bias.axes) == 1 else bias.to((*tokens, self.axis))
            ranked = SCORES[convention(self.gates).score or "softmax"](scores) + each
        # A stable sort orders equal logits by expert, lowest first.
        experts = np.argsort(-ranked, axis=-1, kind="stable")[..., : self.top_k]
        gates = GATE_FUNCTIONS[self.gates](scores, experts) * self.scale
        axes = (*tokens, self.choice)
        return Array(experts, axes), Array(gates, axes)

    def term(self, algebra: Algebra, logits: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k best by the logits, or by the biased score, and gates of their logits."""
        expert, choice = logits.axis(self.axis), algebra.axis(self.choice, self.top_k)
        axes = (*logits.without(self.axis), choice)
        functions = [logits.along(self.axis)]
        score: str = convention(self.gates).score or "softmax" if biases else "logits"
        functions += [bias.along(self.axis) for bias in biases]
        if biases and not all(t.finite for t in (logits, *biases)):
            # −∞ hides the order of logits, and shares reach 0 and 1.
            score = f"{score} of infinite"
        head = Head("experts", (expert.size, self.top_k, score))
        experts = algebra.apply(head, functions, [algebra.index(choice)])
        gates = self._gate_term(logits, expert, choice, experts)
        scaled = terms.scaled(Tensor(algebra, axes, gates), self.scale)
        return Tensor(algebra, axes, experts), replace(scaled, finite=logits.finite)

    def _gate_term(
        self, logits: Tensor, expert: Var, choice: Var, experts: Polynomial
    ) -> Polynomial:
        algebra = logits.algebra
        chosen = logits.at({self.axis: experts})
        if self.gates == "ones":
            return algebra.one
        if not logits.finite:
            # Shares of scores of which all may be −∞ do not add up.
            functions = [logits.along(self.axis), algebra.abstract([choice], experts)]
            head = Head("gate", (f"{self.gates} of infinite",))
            return algebra.apply(head, functions, [algebra.index(choice)])
        if self.gates == "sigmoid":
            return algebra.apply(Head("sigmoid"), (), [chosen])
        if self.gates == "softmax":
            share = Head("share", ("softmax",))
            return algebra.apply(share, [logits.along(self.axis)], [experts])
        if self.gates in ("renormalised", "sigmoid-renormalised"):
            kind = "softmax" if self.gates == "renormalised" else "sigmoid"
            of_chosen = algebra.abstract([choice], chosen)
            return algebra.apply(Head("share", (kind,)), [of_chosen], [algebra.index(choice)])
        functions = [logits.along(self.axis), algebra.abstract([choice], experts)]
        return algebra.apply(Head("gate", (self.gates,)), functions, [algebra.index(choice)])


LEAST_THRESHOLD = 1e-9
"""Lower bound on the threshold: at 0 every gate that is not tiny is kept (mesh-tensorflow)."""


@operation("keep_choices", "gates", results=("keep",), sharding=by_name, variadic=True)
class KeepChoicesOp(Op):
    """Which choices a policy keeps; the first always (ST-MoE, Appendix G).

    all: every one. none: the first alone. threshold: those whose gate is above `threshold`.
    random: those with u < gate / max(threshold, 10⁻⁹) for a uniform number u, the second
    operand; so each is kept with the probability gate / threshold, at most 1.  The paper's
    gates are renormalised, and its threshold is 0.2.
    """

    policy = Word("which choices after the first are kept", "random", choices=get_args(Policy))
    threshold = Float("threshold, random: what gates are compared with", 0.2)
    choice = AxisName("the axis of the choices, best first", "choice")

    def infer(self, *operands: Operand) -> TensorType:
        gates = operands[0].type
        need_float(gates, "the gates")
        axis_of(gates, self.choice)
        no_ragged(gates, (self.choice,), "cannot keep choices")
        count = 2 if self.policy == "random" else 1
        if len(operands) != count:
            raise InputError(
                "keep_choices takes uniform numbers exactly with policy=random",
                expected="%gates, %uniform" if count == 2 else "%gates",
                found=", ".join(f"%{v.name}" for v in operands),
            )
        if not 0 <= self.threshold < inf:
            raise InputError("the threshold must not be negative", found=str(self.threshold))
        for uniform in operands[1:]:
            need_float(uniform.type, "the uniform numbers")
            if set(uniform.type.names) != set(gates.names):
                raise InputError(
                    "there is one uniform number per choice",
                    expected=str(gates),
                    found=str(uniform.type),
                )
            for axis in gates.axes:
                same_size(axis, uniform.type[axis.name])
        return gates.with_dtype(PRED)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (self.choice,)

    def meaning(self, gates: Array, *uniform: Array) -> Array:
        axes = (*(a for a in gates.axes if a != self.choice), self.choice)
        values = gates.to(axes)
        keep = np.full(values.shape, self.policy == "all")
        if self.policy == "threshold":
            keep = values > self.threshold
        for numbers in uniform:
            keep = numbers.to(axes) < values / max(self.threshold, LEAST_THRESHOLD)
        keep[..., 0] = True
        return Array(Array(keep, axes).to(gates.axes), gates.axes)

    def term(self, algebra: Algebra, gates: Tensor, *uniform: Tensor) -> Tensor:
        first = algebra.apply(Head("equal"), (), [algebra.index(gates.axis(self.choice))])
        if self.policy == "all":
            return Tensor(algebra, gates.axes, algebra.one)
        if self.policy == "none":
            return Tensor(algebra, gates.axes, first)
        holds = terms.pointwise("holds", (self.policy, self.threshold), (gates, *uniform))
        keep = terms.chosen(Tensor(algebra, (), first), Tensor(algebra, (), algebra.one), holds)
        return Tensor(algebra, gates.axes, keep.body)


GOLDEN = 0x9E3779B9
"""2³² over the golden ratio, which spreads neighbouring seeds."""


def hashed(ids: Data, seed: int) -> Data:
    """Return a hash of 32 bits: the finaliser of MurmurHash3, of the id and the seed."""
    h = np.atleast_1d(ids.astype(np.uint32)) ^ np.uint32(seed * GOLDEN % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return np.asarray(h ^ (h >> np.uint32(16))).reshape(ids.shape)


@operation("hash_experts", "ids", results=("experts",), sharding=by_name)
class HashExpertsOp(Op):
    """The experts of each token by a hash of its id (Roller et al. 2021); no router at all.

    The first is hash(id, seed) mod experts, the next ones follow it in cyclic order.  The
    hash is the finaliser of MurmurHash3 on 32 bits, or with `modulo` the id itself.
    """

    experts = Int("the number of experts", pins=True)
    top_k = Int("experts per token", 1)
    seed = Int("chooses the hash; layers may have different ones", 0)
    hash = Word("of an id", "murmur", choices=("murmur", "modulo"))
    choice = AxisName("the new axis, of size top_k", "choice")

    def infer(self, ids: Operand) -> TensorType:
        need_kind(ids.type, "int", "the token ids")
        if not 1 <= self.top_k <= self.experts:
            raise InputError(
                "top_k is out of range for the experts",
                expected=f"1 <= top_k <= {self.experts}",
                found=str(self.top_k),
            )
        return TensorType(I32, no_duplicates((*ids.type.axes, Axis(self.choice, self.top_k))))

    def meaning(self, ids: Array) -> Array:
        plain = ids.data.astype(np.uint32)
        number = plain if self.hash == "modulo" else hashed(ids.data, self.seed)
        first = (number % np.uint32(self.experts)).astype(np.int64)
        chosen = (first[..., None] + np.arange(self.top_k)) % self.experts
        return Array(chosen, (*ids.axes, self.choice))

    def term(self, algebra: Algebra, ids: Tensor) -> Tensor:
        choice = algebra.axis(self.choice, self.top_k)
        head = Head("hashed_expert", (self.experts, self.seed, self.hash))
        body = algebra.apply(head, (), [ids.body, algebra.index(choice)])
        return Tensor(algebra, (*ids.axes, choice), body)


# Bounded receive buffers: which rows fit on a device, where an exchange may drop some.
# The exchange itself stays the identity: a row without room gets no slot at all.


def buffer_rows(attrs: Attrs, tokens: int, choices: int) -> int:
    """Return the rows that fit on a device: its share of the choices times the factor.

    Args:
      attrs: of a ``within_buffer`` node.
      tokens: the tokens of a block of devices that exchange rows.
      choices: the choices of a token.
    """
    share = Fraction(tokens * choices, attrs["parts"])
    return ceil(Fraction(repr(attrs["factor"])) * share)


def _local_blocks(node: Definition, mesh: Mesh) -> Attrs:
    shards = mesh.size(node.operands[2].type["group"].mesh)
    return {**node.attrs, "blocks": node.attrs["blocks"] // shards}


@operation(
    "within_buffer",
    "experts slots counts",
    results=("keep",),
    sharding=received,
    local=_local_blocks,
)
class WithinBufferOp(Op):
    """Which choices have a slot and room in the buffer of the device that has their expert.

    Experts are cut into `parts` equal runs, one a device, and groups into `blocks` equal runs
    that exchange rows among themselves.  A device has room for `factor` times its share of the
    choices of a block, rounded up; rows arrive by group, then expert, then slot, and what
    arrives later is left out.  counts says how many slots of each group and expert are taken.
    As `keep` of an ``assign_slots`` the result leaves the other slots as they are.
    """

    tokens = AxisNames("the token axes")
    parts = Int("how many devices share the experts")
    blocks = Int("how many sets of such devices there are", 1)
    factor = Float("the room of a device, in shares")

    def infer(self, experts_value: Operand, slots_value: Operand, counted: Operand) -> TensorType:
        experts, slots, counts = experts_value.type, slots_value.type, counted.type
        need_kind(experts, "int", "the experts")
        need_kind(slots, "int", "the slots")
        need_float(counts, "the counts")
        for name in self.tokens:
            axis_of(experts, name)
        no_ragged(experts, experts.names, "no buffer")
        if not self.tokens or experts.names != slots.names or experts.sizes != slots.sizes:
            raise InputError(
                "experts and slots belong to different choices",
                expected=str(experts),
                found=str(slots),
            )
        if len(experts) != len(self.tokens) + 1 or set(counts.names) != {"group", "expert"}:
            raise InputError(
                "rows are counted by group and expert, and choices by token",
                expected=f"counts [group, expert]; {', '.join(self.tokens)} and an axis of choices",
                found=f"{counts}; {experts}",
            )
        for axis, name in (("expert", "parts"), ("group", "blocks")):
            size, number = counts[axis].size, self.attrs[name]
            if number < 1 or (isinstance(size, int) and size % number):
                raise InputError(
                    f"{name} do not divide the axis {axis!r}",
                    expected=f"a divisor of {size}",
                    found=str(number),
                )
        if not 0 < self.factor < inf:
            raise InputError("a buffer needs a positive factor", found=str(self.factor))
        # A device must know the counts of all that it exchanges with.
        tokens, mesh = experts[self.tokens[0]].mesh, counts["group"].mesh
        if counts["expert"].mesh or counts.unreduced or tokens[: len(mesh)] != mesh:
            raise InputError(
                "the counts are not sharded so that a device knows those of its peers",
                expected=f"group on the outermost of {'*'.join(tokens) or 'no mesh axis'}",
                found=str(counts),
                hint="all_gather them over the mesh axes of the exchange",
            )
        return TensorType(PRED, experts.axes)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return self.tokens

    def meaning(self, experts: Array, slots: Array, counts: Array) -> Array:
        return self.kept_from(experts, slots, counts, first=0, groups=counts.size("group"))

    def kept_from(
        self, experts: Array, slots: Array, counts: Array, *, first: int, groups: int
    ) -> Array:
        """Return the result for tokens of `groups` groups, the first of which is number `first`."""
        (choice,) = (a for a in experts.axes if a not in self.tokens)
        layout = (*self.tokens, choice)
        shape = [experts.size(a) for a in layout]
        chosen, assigned = (x.to(layout).reshape(-1, shape[-1]) for x in (experts, slots))
        all_groups = counts.size("group")
        if all_groups % self.blocks or len(chosen) % groups:
            raise InputError(
                "the groups do not divide the tokens, or blocks the groups",
                expected=f"a multiple of {groups} tokens and of {self.blocks} groups",
                found=f"{len(chosen)} tokens, {all_groups} groups",
            )
        size = len(chosen) // groups
        rows = buffer_rows(self.attrs, size * all_groups // self.blocks, shape[-1])
        room = self._room(counts.to(("group", "expert")), rows)
        group = first + np.arange(len(chosen)) // max(size, 1)
        exists = (assigned >= 0) & (chosen >= 0) & (chosen < counts.size("expert"))
        keep = exists & (assigned < room[group[:, None], np.where(exists, chosen, 0)])
        return Array(Array(keep.reshape(shape), layout).to(experts.axes), experts.axes)

    def _room(self, counts: Data, rows: int) -> Data:
        """Return how many slots of each group and expert fit, ``[group, expert]``."""
        (groups, experts), blocks, parts = counts.shape, self.blocks, self.parts
        cells = counts.reshape(blocks, groups // blocks, parts, experts // parts)
        # In the order of arrival: group, then expert, for each block and device.
        line = cells.transpose(0, 2, 1, 3).reshape(blocks, parts, -1)
        room = np.clip(rows - (np.cumsum(line, -1) - line), 0, line)
        back = room.reshape(blocks, parts, groups // blocks, experts // parts)
        return np.asarray(back.transpose(0, 2, 1, 3).reshape(groups, experts))
