"""Routing as plain tensors: the experts and gates of each token, and which of them are kept.

``route`` picks experts and gates, ``keep_choices`` is the policy for all but the first, and
``hash_experts`` knows the expert from the token alone.  `moecc.ir.ops.slots` assigns slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, inf
from typing import TYPE_CHECKING

import numpy as np

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data, meaning
from moecc.ir.conventions import CONVENTIONS, GATES, Score, convention
from moecc.ir.operand import Attrs as _BuffersAttrs
from moecc.ir.operand import Definition, Operand
from moecc.ir.operation import Attr, Attrs, OpDef, register
from moecc.ir.ops.contraction import normalised
from moecc.ir.ops.elementwise import logistic
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    combined,
    gates_dispatched,
    need_float,
    need_kind,
    no_duplicates,
    no_ragged,
    received,
    same_size,
)
from moecc.ir.ops.slots import (
    assigner,
    check_experts,
    check_gates,
    operands_by_word,
    slot_axes,
    tokens_of,
)
from moecc.ir.traits import OPERAND, PAIR, Residual, RowMove
from moecc.types import I32, PRED, Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.mesh import Mesh


POLICIES = ("all", "none", "threshold", "random")
"""Policies for choices after the first (ST-MoE, Appendix G)."""


_SPELLED = "\n".join(f"{row.name}: {row.doc}." for row in CONVENTIONS)


def _infer_route(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    logits = operands[0].type
    need_float(logits, "the router's logits")
    expert = axis_of(logits, attrs["axis"])
    no_ragged(logits, (expert.name,), "cannot choose")
    k = attrs["top_k"]
    if k < 1 or (isinstance(expert.size, int) and k > expert.size):
        raise InputError(
            "top_k is out of range for the experts",
            expected=f"1 <= top_k <= {expert.size}",
            found=str(k),
        )
    most = convention(attrs["gates"]).max_top_k
    if most is not None and k > most:
        defined = " and ".join(map(str, range(1, most + 1)))
        raise InputError(f"{attrs['gates']} gates are defined for top_k {defined}", found=str(k))
    bias = operands_by_word(operands, attrs).get("bias")
    if bias is not None:
        _check_bias(bias.type, expert, attrs["gates"])
    rest = [a for a in logits.axes if a is not expert]
    axes = no_duplicates((*rest, Axis(attrs["choice"], k)))
    return (TensorType(I32, axes), TensorType(logits.dtype, axes))


def _check_bias(bias: TensorType, expert: Axis, gates: str) -> None:
    need_float(bias, "the bias")
    if bias.names != (expert.name,):
        raise InputError(
            "the bias has one element per expert", expected=str(expert), found=str(bias)
        )
    same_size(expert, bias[expert.name])
    if convention(gates).score is None:
        raise InputError(f"{gates} gates have no score that a bias could be added to")


register(
    OpDef(
        "route",
        f"""The k experts with the largest logits, best first, and their gates.

        A tie takes the lowest expert.  The gate conventions are

        {_SPELLED}

        All times `scale`.

        `using=bias` adds an operand `[expert]`: experts are then chosen, and put in order, by
        their score (the sigmoid or softmax of the logits, as the convention has it) plus the bias;
        gates are made of the logits alone (loss-free balancing, Wang et al. 2024).""",
        ("logits",),
        _infer_route,
        results=("experts", "gates"),
        attrs={
            "top_k": Attr("int", doc="experts per token", pins=True),
            "gates": Attr("str", "renormalised", GATES, doc="the gate convention"),
            "scale": Attr("float", 1.0, doc="what the gates are multiplied by"),
            "axis": Attr("axis", "expert", doc="the axis of the experts", pins=True),
            "choice": Attr("axis", "choice", doc="the new axis, of size top_k"),
            "using": Attr("words", (), ("bias",), doc="what the further operands are"),
            "precision": Attr(
                "str", "f32", ("default", "f32"), doc="default: in the type of the run, even bf16"
            ),
        },
        mixes=lambda _operands, attrs: (attrs["axis"],),
        residual=OPERAND,
        sharding=by_name,
        chooses=True,
        variadic=True,
    )
)


def _infer_keep(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    gates = operands[0].type
    need_float(gates, "the gates")
    axis_of(gates, attrs["choice"])
    no_ragged(gates, (attrs["choice"],), "cannot keep choices")
    count = 2 if attrs["policy"] == "random" else 1
    if len(operands) != count:
        raise InputError(
            "keep_choices takes uniform numbers exactly with policy=random",
            expected="%gates, %uniform" if count == 2 else "%gates",
            found=", ".join(f"%{v.name}" for v in operands),
        )
    if not 0 <= attrs["threshold"] < inf:
        raise InputError("the threshold must not be negative", found=str(attrs["threshold"]))
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
    return (gates.with_dtype(PRED),)


register(
    OpDef(
        "keep_choices",
        """Which choices a policy keeps; the first always (ST-MoE, Appendix G).

        all: every one. none: the first alone. threshold: those whose gate is above `threshold`.
        random: those with u < gate / max(threshold, 10⁻⁹) for a uniform number u, the second
        operand; so each is kept with the probability gate / threshold, at most 1.  The paper's
        gates are renormalised, and its threshold is 0.2.""",
        ("gates",),
        _infer_keep,
        results=("keep",),
        attrs={
            "policy": Attr("str", "random", POLICIES, doc="which choices after the first are kept"),
            "threshold": Attr("float", 0.2, doc="threshold, random: what gates are compared with"),
            "choice": Attr("axis", "choice", doc="the axis of the choices, best first"),
        },
        mixes=lambda _operands, attrs: (attrs["choice"],),
        sharding=by_name,
        variadic=True,
    )
)


def _infer_hash(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    ids = operands[0].type
    need_kind(ids, "int", "the token ids")
    if not 1 <= attrs["top_k"] <= attrs["experts"]:
        raise InputError(
            "top_k is out of range for the experts",
            expected=f"1 <= top_k <= {attrs['experts']}",
            found=str(attrs["top_k"]),
        )
    return (TensorType(I32, no_duplicates((*ids.axes, Axis(attrs["choice"], attrs["top_k"])))),)


register(
    OpDef(
        "hash_experts",
        """The experts of each token by a hash of its id (Roller et al. 2021); no router at all.

        The first is hash(id, seed) mod experts, the next ones follow it in cyclic order.  The
        hash is the finaliser of MurmurHash3 on 32 bits, or with `modulo` the id itself.""",
        ("ids",),
        _infer_hash,
        results=("experts",),
        attrs={
            "experts": Attr("int", doc="the number of experts", pins=True),
            "top_k": Attr("int", 1, doc="experts per token"),
            "seed": Attr("int", 0, doc="chooses the hash; layers may have different ones"),
            "hash": Attr("str", "murmur", ("murmur", "modulo"), doc="of an id"),
            "choice": Attr("axis", "choice", doc="the new axis, of size top_k"),
        },
        sharding=by_name,
    )
)


# Rows combined by their gates, or gates sent with the rows, which come back weighted.
#
# ``combine(rows, gates)`` is ``combine_weighted(weight_rows(rows, dispatch_gates(gates)))``.
# Where
# rows return from other devices, the gradient of the gates then needs no row that has returned.


def _infer_combine(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, experts, slots, gates = operands
    check_experts(slots, experts)
    check_gates(slots, gates.type)
    need_float(gates.type, "the gates")
    return (_combined_type(rows.type, slots),)


def _combined_type(rows: TensorType, slots: Operand) -> TensorType:
    """Return the type of the tokens that `rows` are combined to.

    Raises:
      InputError: the rows are not those of `slots`, or no numbers.
    """
    for axis in slot_axes(slots):
        same_size(axis_of(rows, axis.name, "the rows"), axis)
    need_float(rows, "the rows")
    tokens = tokens_of(slots)
    inner = (a for a in rows.axes if a.name not in ("group", "expert", "slot"))
    outer = (a for a in slots.type.axes if a.name in tokens)
    return rows.with_axes(no_duplicates((*outer, *inner)))


def _mixes_rows(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    """Return what an operation mixes that makes tokens of rows."""
    # The position of a token determines the group of its rows.
    return ("group", "expert", "slot", *tokens_of(operands[2]))


register(
    OpDef(
        "combine",
        "For each token the sum over its choices of gate times row; a dropped one adds nothing.",
        ("rows", "experts", "slots", "gates"),
        _infer_combine,
        mixes=_mixes_rows,
        linear=(0, 3),
        residual=Residual((0, 1, 2, 3)),
        sharding=combined,
        moves=RowMove.TO_TOKENS,
    )
)


def _infer_dispatch_gates(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    gates, experts, slots = operands
    check_experts(slots, experts)
    check_gates(slots, gates.type)
    need_float(gates.type, "the gates")
    return (gates.type.with_axes(slot_axes(slots)),)


register(
    OpDef(
        "dispatch_gates",
        "The gate of the choice that has each slot; an empty slot holds zero.",
        ("gates", "experts", "slots"),
        _infer_dispatch_gates,
        results=("row_gates",),
        mixes=lambda operands, _attrs: operands[0].type.names,
        linear=(0,),
        residual=Residual((1, 2)),
        sharding=gates_dispatched,
        moves=RowMove.GATES_TO_SLOTS,
    )
)


def _infer_weight_rows(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, gates = (v.type for v in operands)
    need_float(rows, "the rows")
    need_float(gates, "the gates")
    for axis in gates:
        same_size(axis_of(rows, axis.name, "the rows"), axis)
    return (rows,)


register(
    OpDef(
        "weight_rows",
        "Each row times its gate, in the type of the rows.",
        ("rows", "row_gates"),
        _infer_weight_rows,
        results=("weighted",),
        attrs={
            "precision": Attr(
                "str", "f32", ("default", "f32"), doc="of the product, before it is rounded"
            )
        },
        linear=(0, 1),
        elementwise=True,
        residual=PAIR,
        sharding=by_name,
    )
)


def _infer_combine_weighted(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, experts, slots = operands
    check_experts(slots, experts)
    assigner(slots)
    return (_combined_type(rows.type, slots),)


register(
    OpDef(
        "combine_weighted",
        "For each token the sum over its choices of their rows; a dropped one adds nothing.",
        ("rows", "experts", "slots"),
        _infer_combine_weighted,
        mixes=_mixes_rows,
        linear=(0,),
        residual=Residual((1, 2)),
        sharding=combined,
        moves=RowMove.TO_TOKENS,
    )
)


# Bounded receive buffers: which rows fit on a device, where an exchange may drop some.
#
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


def _infer_within_buffer(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    experts, slots, counts = (v.type for v in operands)
    need_kind(experts, "int", "the experts")
    need_kind(slots, "int", "the slots")
    need_float(counts, "the counts")
    tokens: tuple[str, ...] = attrs["tokens"]
    for name in tokens:
        axis_of(experts, name)
    no_ragged(experts, experts.names, "no buffer")
    if not tokens or experts.names != slots.names or experts.sizes != slots.sizes:
        raise InputError(
            "experts and slots belong to different choices",
            expected=str(experts),
            found=str(slots),
        )
    if len(experts) != len(tokens) + 1 or set(counts.names) != {"group", "expert"}:
        raise InputError(
            "rows are counted by group and expert, and choices by token",
            expected=f"counts [group, expert]; {', '.join(tokens)} and an axis of choices",
            found=f"{counts}; {experts}",
        )
    _check_numbers(counts, attrs)
    _check_placement(experts[tokens[0]].mesh, counts)
    return (TensorType(PRED, experts.axes),)


def _check_numbers(counts: TensorType, attrs: Attrs) -> None:
    for what, name in (("expert", "parts"), ("group", "blocks")):
        size, number = counts[what].size, attrs[name]
        if number < 1 or (isinstance(size, int) and size % number):
            raise InputError(
                f"{name} do not divide the axis {what!r}",
                expected=f"a divisor of {size}",
                found=str(number),
            )
    if not 0 < attrs["factor"] < inf:
        raise InputError("a buffer needs a positive factor", found=str(attrs["factor"]))


def _check_placement(tokens: tuple[str, ...], counts: TensorType) -> None:
    """Raise InputError unless a device knows the counts of all that it exchanges with."""
    mesh = counts["group"].mesh
    if counts["expert"].mesh or counts.unreduced or tokens[: len(mesh)] != mesh:
        raise InputError(
            "the counts are not sharded so that a device knows those of its peers",
            expected=f"group on the outermost of {'*'.join(tokens) or 'no mesh axis'}",
            found=str(counts),
            hint="all_gather them over the mesh axes of the exchange",
        )


def _in_own_block(node: Definition, mesh: Mesh) -> Attrs:
    shards = mesh.size(node.operands[2].type["group"].mesh)
    return {**node.attrs, "blocks": node.attrs["blocks"] // shards}


register(
    OpDef(
        "within_buffer",
        """Which choices have a slot and room in the buffer of the device that has their expert.

        Experts are cut into `parts` equal runs, one a device, and groups into `blocks` equal runs
        that exchange rows among themselves.  A device has room for `factor` times its share of the
        choices of a block, rounded up; rows arrive by group, then expert, then slot, and what
        arrives later is left out.  counts says how many slots of each group and expert are taken.
        As `keep` of an ``assign_slots`` the result leaves the other slots as they are.""",
        ("experts", "slots", "counts"),
        _infer_within_buffer,
        results=("keep",),
        attrs={
            "tokens": Attr("axes", doc="the token axes"),
            "parts": Attr("int", doc="how many devices share the experts"),
            "blocks": Attr("int", 1, doc="how many sets of such devices there are"),
            "factor": Attr("float", doc="the room of a device, in shares"),
        },
        mixes=lambda _operands, attrs: tuple(attrs["tokens"]),
        sharding=received,
        local=_in_own_block,
    )
)


# The meaning of routing: choices, gates, and which of them are kept.

JITTER = 0.01
"""Half the relative distance from the best logit within which sparsemixer counts (PhiMoE)."""


@meaning("route")
def route(
    logits: Array,
    *bias: Array,
    top_k: int,
    gates: str,
    scale: float,
    axis: str,
    choice: str,
    using: tuple[str, ...],
    precision: str,
) -> tuple[Array, Array]:
    """Return the experts with the largest logits, best first, and their gates."""
    rest = tuple(a for a in logits.axes if a != axis)
    scores = logits.to((*rest, axis))
    ranked = scores
    for added in bias:
        ranked = SCORES[convention(gates).score or "softmax"](scores) + added.data
    # A stable sort orders equal logits by expert, lowest first.
    experts = np.argsort(-ranked, axis=-1, kind="stable")[..., :top_k]
    weights = GATE_FUNCTIONS[gates](scores, experts) * scale
    axes = (*rest, choice)
    return Array(experts, axes), Array(weights, axes)


def _of(scores: Data, experts: Data) -> Data:
    return np.take_along_axis(scores, experts, -1)


def _renormalised(scores: Data, experts: Data) -> Data:
    return normalised(_of(scores, experts))


def _softmax(scores: Data, experts: Data) -> Data:
    return _of(normalised(scores), experts)


def _sigmoid_renormalised(scores: Data, experts: Data) -> Data:
    chosen = logistic(_of(scores, experts))
    return np.asarray(chosen / chosen.sum(-1, keepdims=True))


def _sigmoid(scores: Data, experts: Data) -> Data:
    return logistic(_of(scores, experts))


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


def _ones(scores: Data, experts: Data) -> Data:
    return np.ones(experts.shape)


SCORES: dict[Score, Callable[[Data], Data]] = {"softmax": normalised, "sigmoid": logistic}
"""What a routing bias is added to, by the score of the convention."""

GATE_FUNCTIONS: dict[str, Callable[[Data, Data], Data]] = {
    "renormalised": _renormalised,
    "softmax": _softmax,
    "sigmoid-renormalised": _sigmoid_renormalised,
    "sigmoid": _sigmoid,
    "sparsemixer": _sparsemixer,
    "ones": _ones,
}
"""From logits `[…, expert]` and choices `[…, choice]` to gates `[…, choice]`."""


@meaning("keep_choices")
def keep_choices(
    gates: Array, *uniform: Array, policy: str, threshold: float, choice: str
) -> Array:
    """Return which choices the policy keeps; the first always."""
    rest = tuple(a for a in gates.axes if a != choice)
    values = gates.to((*rest, choice))
    keep = np.full(values.shape, policy == "all")
    if policy == "threshold":
        keep = values > threshold
    for numbers in uniform:
        keep = numbers.to((*rest, choice)) < values / max(threshold, LEAST_THRESHOLD)
    keep[..., 0] = True
    return Array(Array(keep, (*rest, choice)).to(gates.axes), gates.axes)


LEAST_THRESHOLD = 1e-9
"""Lower bound on the threshold: at 0 every gate that is not tiny is kept (mesh-tensorflow)."""


@meaning("hash_experts")
def hash_experts(
    ids: Array, *, experts: int, top_k: int, seed: int, hash: str, choice: str
) -> Array:
    """Return the hash of each id modulo the number of experts, and those after it."""
    plain = ids.data.astype(np.uint32)
    first = (plain if hash == "modulo" else hashed(ids.data, seed)) % np.uint32(experts)
    chosen = (first.astype(np.int64)[..., None] + np.arange(top_k)) % experts
    return Array(chosen, (*ids.axes, choice))


def hashed(ids: Data, seed: int) -> Data:
    """Return a hash of 32 bits: the finaliser of MurmurHash3, of the id and the seed."""
    h = np.atleast_1d(ids.astype(np.uint32)) ^ np.uint32(seed * GOLDEN % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return np.asarray(h ^ (h >> np.uint32(16))).reshape(ids.shape)


GOLDEN = 0x9E3779B9
"""2³² over the golden ratio, which spreads neighbouring seeds."""


# The meaning of bounded receive buffers.


@meaning("within_buffer")
def within_buffer(
    experts: Array, slots: Array, counts: Array, *, tokens: tuple[str, ...], **attrs: object
) -> Array:
    """Return which choices have a slot and room at the device of their expert.

    Raises:
      InputError: blocks do not divide the groups, or groups the tokens.
    """
    total = counts.size("group")
    return kept_from(experts, slots, counts, tokens, attrs, first=0, groups=total)


def kept_from(
    experts: Array,
    slots: Array,
    counts: Array,
    tokens: tuple[str, ...],
    attrs: _BuffersAttrs,
    *,
    first: int,
    groups: int,
) -> Array:
    """Return the result for tokens of `groups` groups, the first of which is number `first`."""
    (choice,) = (a for a in experts.axes if a not in tokens)
    layout = (*tokens, choice)
    shape = [experts.size(a) for a in layout]
    chosen, taken = (x.to(layout).reshape(-1, shape[-1]) for x in (experts, slots))
    every = counts.size("group")
    if every % attrs["blocks"] or len(chosen) % groups:
        raise InputError(
            "the groups do not divide the tokens, or blocks the groups",
            expected=f"a multiple of {groups} tokens and of {attrs['blocks']} groups",
            found=f"{len(chosen)} tokens, {every} groups",
        )
    each = len(chosen) // groups
    rows = buffer_rows(attrs, each * every // attrs["blocks"], shape[-1])
    room = _room(counts.to(("group", "expert")), attrs, rows)
    group = first + np.arange(len(chosen)) // max(each, 1)
    there = (taken >= 0) & (chosen >= 0) & (chosen < counts.size("expert"))
    limit = room[group[:, None], np.where(there, chosen, 0)]
    keep = there & (taken < limit)
    return Array(Array(keep.reshape(shape), layout).to(experts.axes), experts.axes)


def _room(counts: Data, attrs: _BuffersAttrs, rows: int) -> Data:
    """Return how many slots of each group and expert fit, ``[group, expert]``."""
    groups, experts = counts.shape
    blocks, parts = attrs["blocks"], attrs["parts"]
    cells = counts.reshape(blocks, groups // blocks, parts, experts // parts)
    # In the order of arrival: group, then expert, for each block and device.
    line = cells.transpose(0, 2, 1, 3).reshape(blocks, parts, -1)
    before = np.cumsum(line, -1) - line
    room = np.clip(rows - before, 0, line)
    back = room.reshape(blocks, parts, groups // blocks, experts // parts)
    return np.asarray(back.transpose(0, 2, 1, 3).reshape(groups, experts))
