"""Routing as plain tensors: the experts and gates of each token, and which of them are kept.

``route`` picks experts and gates, ``keep_choices`` is the policy for all but the first, and
``hash_experts`` knows the expert from the token alone.  `moecc.ir.table.slots` assigns slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from moecc.errors import InputError
from moecc.ir.gates import CONVENTIONS, GATES, convention
from moecc.ir.operand import Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.table.rules import axis_of, need_float, need_kind, no_duplicates, no_ragged, same_size
from moecc.ir.table.sharding import by_name
from moecc.ir.table.slots import operands_by_word
from moecc.ir.traits import OPERAND
from moecc.types.dtypes import I32, PRED
from moecc.types.tensor import Axis, TensorType

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
