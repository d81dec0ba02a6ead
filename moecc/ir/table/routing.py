"""Routing as plain tensors: the experts and gates of each token, and which of them are kept.

``route`` picks experts and gates, ``keep_choices`` is the policy for all but the first, and
``hash_experts`` knows the expert from the token alone.  `moecc.ir.table.slots` assigns slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, inf
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.conventions import CONVENTIONS, GATES, convention
from moecc.ir.operand import Definition, Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import (
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
from moecc.ir.table.slots import (
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
