"""The rules of flow: the dimensions that each operation loops over (see `moecc.ir.flow`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moecc.ir.flow import Names, Space, flow
from moecc.ir.operand import Operand
from moecc.ir.ops import OPS, Attrs
from moecc.ir.table.elementwise import UNARY
from moecc.ir.table.placing import placing


def _own(names: Iterable[str]) -> dict[str, str]:
    return {n: n for n in names}


def _by_name(operands: Sequence[Operand]) -> tuple[tuple[Names, ...], dict[str, str]]:
    """Return dimensions called as the axes are, of the operands and of all of them together."""
    every = _own(n for v in operands for n in v.type.names)
    return tuple(_own(v.type.names) for v in operands), every


_ALIKE = (
    *UNARY,
    *("neg", "scale", "stop_gradient", "add", "sub", "mul", "div", "maximum", "minimum"),
    *("cast", "select", "mask", "less", "equal", "constant", "fold_key", "broadcast", "one_hot"),
    *("random_uniform", "random_normal", "causal", "relative_buckets", "hash_experts", "stack"),
)


@flow(*_ALIKE)
def _alike(operands: Sequence[Operand], attrs: Attrs) -> Space:
    # Random numbers belong to their places, and every device knows the places of its elements.
    return Space(*_by_name(operands))


def _mixing(name: str) -> None:
    """Give an operation the rule that it needs what it mixes whole, and the rest by name."""

    @flow(name)
    def rule(operands: Sequence[Operand], attrs: Attrs) -> Space:
        return Space(*_by_name(operands), whole=frozenset(OPS[name].mixes(operands, attrs)))


for _name in ("softmax", "rms_norm", "layer_norm", "max", "logsumexp", "rope", "rotate", "slice"):
    _mixing(_name)
for _name in ("route", "keep_choices", "index"):
    _mixing(_name)


@flow("sum", "mean")
def _summing(operands: Sequence[Operand], attrs: Attrs) -> Space:
    return Space(*_by_name(operands), summed=frozenset(attrs["axes"]))


@flow("contract")
def _contract(operands: Sequence[Operand], attrs: Attrs) -> Space:
    return Space(*_by_name(operands), summed=frozenset(attrs["over"]))


@flow("chunk", "join")
def _chunks(operands: Sequence[Operand], attrs: Attrs) -> Space:
    counts = {attrs["axis"]: ("parts", attrs["parts"])}
    return Space(*_by_name(operands), counts=counts)


@flow("rename")
def _rename(operands: Sequence[Operand], attrs: Attrs) -> Space:
    own = _own(operands[0].type.names)
    kept = {n: d for n, d in own.items() if n != attrs["axis"]}
    return Space((own,), {**kept, attrs["to"]: attrs["axis"]})


@flow("split")
def _split(operands: Sequence[Operand], attrs: Attrs) -> Space:
    """The first of the new axes is the outermost, so a part of the old axis is a part of it."""
    own = _own(operands[0].type.names)
    kept = {n: d for n, d in own.items() if n != attrs["axis"]}
    return Space((own,), {**kept, attrs["into"][0][0]: attrs["axis"]})


@flow("merge")
def _merge(operands: Sequence[Operand], attrs: Attrs) -> Space:
    own = _own(operands[0].type.names)
    first, *others = attrs["axes"]
    kept = {n: d for n, d in own.items() if n not in attrs["axes"]}
    return Space((own,), {**kept, attrs["into"]: first}, whole=frozenset(others))


@flow("positions")
def _positions(operands: Sequence[Operand], attrs: Attrs) -> Space:
    one = _own([attrs["axis"]])
    return Space((one,), one)


@flow("embedding")
def _embedding(operands: Sequence[Operand], attrs: Attrs) -> Space:
    """A device adds the rows of its part of the table, and nothing for the others."""
    table, ids = (v.type for v in operands)
    rows = {n: n for n in table.names if n != attrs["axis"]}
    picked = {**rows, attrs["axis"]: f"table.{attrs['axis']}"}
    own = _own(ids.names)
    summed = frozenset([f"table.{attrs['axis']}"])
    return Space((picked, own), {**rows, **own}, summed=summed)


def _tokens(names: Iterable[str], tokens: Sequence[str]) -> dict[str, str]:
    """Return dimensions by name, of which the outermost token axis is that of the groups.

    Tokens are numbered outermost first and cut into groups, so a part of the outermost axis is a
    run of whole groups, and a part of another axis is not.
    """
    return {n: "group" if n == tokens[0] else n for n in names}


@flow("place", "expert_choice")
def _placing(operands: Sequence[Operand], attrs: Attrs) -> Space:
    tokens = attrs["tokens"]
    names = tuple(_tokens(v.type.names, tokens) for v in operands)
    every = {n: d for own in names for n, d in own.items()}
    counts = {} if attrs["group_size"] else {"group": ("groups", attrs["groups"])}
    return Space(names, every, whole=frozenset(every.values()) - {"group"}, counts=counts)


@flow("within_buffer")
def _within_buffer(operands: Sequence[Operand], attrs: Attrs) -> Space:
    # Where the counts lie is checked by the operation: of all that a device exchanges with.
    names = tuple(_tokens(v.type.names, attrs["tokens"]) for v in operands[:2])
    every = {n: d for own in names for n, d in own.items()}
    return Space((*names, {}), every, whole=frozenset(every.values()) - {"group"})


@flow("dispatch", "group_sum")
def _dispatch(operands: Sequence[Operand], attrs: Attrs) -> Space:
    tokens = placing(operands[-1]).attrs["tokens"]
    names = tuple(_tokens(v.type.names, tokens) for v in operands)
    routing = {d for own in names[1:] for d in own.values()}
    kept = {n: d for n, d in names[0].items() if n not in tokens}
    whole = frozenset((routing | set(tokens)) - {"group"})
    return Space(names, {**kept, "group": "group"}, whole=whole)


@flow("combine")
def _combine(operands: Sequence[Operand], attrs: Attrs) -> Space:
    """A device combines the rows of its experts; what other experts add is summed afterwards."""
    rows, _, place, _ = operands
    tokens = placing(place).attrs["tokens"]
    routing = tuple(_tokens(v.type.names, tokens) for v in operands[1:])
    own = _own(rows.type.names)
    whole = frozenset({"slot", *(d for r in routing for d in r.values())} - {"group", "expert"})
    kept = {n: n for n in rows.type.names if n not in ("group", "expert", "slot")}
    kept |= {n: d for n, d in routing[1].items() if n in tokens}
    return Space((own, *routing), kept, summed=frozenset(["expert"]), whole=whole)
