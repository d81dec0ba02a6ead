"""Traits are proved, not trusted: each is evaluated, and a row that says something else fails.

The second half changes every trait of every row, one at a time, and each change must be found.
"""

from dataclasses import fields, replace
from functools import cache
from math import prod

import numpy as np
import pytest
from moecc_backends.reference import ReferenceBackend

from moecc.errors import InputError
from moecc.ir import F32, OPS, Graph, tensor
from moecc.ir.devices import simulate
from moecc.ir.operation import OpDef, mixes_none
from moecc.ir.ops.rules import by_place
from moecc.ir.traits import (
    CollectiveKind,
    Cut,
    Domain,
    Homogeneity,
    IndexOperand,
    Product,
    Residual,
    Role,
    RowMove,
)

from . import evaluated_axes as axes
from . import evaluated_derivatives as derivatives
from . import evaluated_traits as found
from .operations import Function, applied, sample

WRONG = (AssertionError, ValueError, IndexError, ZeroDivisionError, InputError)
"""What a wrong row leads to: a trait that differs, or a meaning that cannot be evaluated so."""

KNOWN = sorted(name for name, entry in OPS.items() if not entry.opaque)
"""Operations with a meaning that can be evaluated."""


def _mixes(entry):
    node = sample(entry.name)
    said = set(entry.mixes(node.operands, node.attrs))
    # A body may do anything, so a scan is taken to mix whatever axes come in.
    if node.body is None:
        assert said == found.mixed(entry.name)
    assert found.mixed(entry.name) <= said


def _elementwise(entry):
    assert entry.elementwise == axes.is_elementwise(entry.name)
    assert entry.logical == axes.is_logical(entry.name)


def _linear(entry):
    assert (entry.linear, entry.jointly) == derivatives.linear(entry.name)


def _alias(entry):
    assert entry.alias == found.is_alias(entry.name)
    assert entry.blocks_gradient == found.blocks_gradient(entry.name)


def _residual(entry):
    of = entry.residual.of
    assert entry.residual == derivatives.residual(entry.name, of)
    # Operands without a gradient are said only where that makes a difference.
    assert not of or replace(entry.residual, of=()) != derivatives.residual(entry.name)


def _homogeneous(entry):
    count, said = len(entry.operands), entry.homogeneity
    together = derivatives.alike(entry.name)
    if together is not None:
        assert said == Homogeneity(together, alike=True)
    else:
        assert said == Homogeneity(derivatives.degrees(entry.name)[:count])


def _normalises(entry):
    assert entry.normalises == found.normalises(entry.name)


def _domain(entry):
    assert entry.domain is found.domain(entry.name)


def _commutative(entry):
    assert entry.commutative == found.commutes(entry.name)


def _roles(entry):
    assert entry.roles == found.roles(entry.name)


def _moves(entry):
    assert entry.moves is found.moves(entry.name)


def _attends(entry):
    assert entry.attends == found.attends(entry.name)
    assert entry.recurs == found.recurs(entry.name)


def _collective(entry):
    assert entry.collective is found.collective(entry.name)
    has_body = any(spec.kind == "region" for spec in entry.attrs.values())
    assert entry.places == (entry.collective is not None or has_body)


def _routing(entry):
    assert entry.chooses == found.chooses(entry.name)
    assert entry.assigns_slots == found.assigns_slots(entry.name)


def _index(entry):
    node, index = sample(entry.name), entry.index
    said = None if index is None else (index.operand, index.below(node), index.strict)
    assert said == found.index(entry.name)


def _sizes(entry):
    """Where elements are kept and axes not, sizes are products; where some go, it is a cut."""
    node = sample(entry.name)
    rule = None if entry.sizes is None else entry.sizes(node)
    if not found.is_alias(entry.name) or entry.elementwise or len(node.operands) > 1:
        assert rule is None
        return
    before, after = ([int(str(s)) for s in v.type.sizes] for v in (node.operands[0], node.result))
    if before == after:
        assert rule is None
    elif prod(before) == prod(after):
        assert isinstance(rule, Product)
        assert rule.size == prod(int(str(p)) for p in rule.parts)
    else:
        assert isinstance(rule, Cut)
        size, made = next((a, b) for a, b in zip(before, after, strict=True) if a != b)
        assert (rule.size, rule.ends[1] - rule.ends[0]) == (size, made)


def _attributes(entry):
    """A smaller graph has what a size or an end within one says smaller, and as many experts."""
    node = sample(entry.name)
    for name, spec in entry.attrs.items():
        value = node.attrs[name]
        if spec.kind == "int":
            assert spec.shrinks == (name in _SHRINKING.get(entry.name, ()))
        pins = spec.pins
        assert pins == (name in _PINNING.get(entry.name, ())), (name, value)


_SHRINKING = {"rope": ("size",), "slice": ("start", "stop")}
"""Numbers that are sizes of axes, or ends within them: the types of results follow them."""

_PINNING = {
    "scan": ("over",),
    "assign_slots": ("experts",),
    "expert_choice": ("experts",),
    "hash_experts": ("experts",),
    "route": ("top_k", "axis"),
}
"""What says how many layers or experts there are, and how many of these are chosen."""


def _shares(entry):
    """Devices that run the operation on shards give the shards of what it gives on the whole."""
    if entry.places:
        return
    node = sample(entry.name)
    names = dict.fromkeys(a for v in node.graph.inputs.values() for a in v.type.names)
    taken = {axis for axis in names if _is_right_on_shards(entry, axis)}
    needed = _summed(entry.name)
    assert taken or not any(v.type.names for v in node.operands)
    assert needed <= taken


def _summed(name):
    """Return the axes that a sum runs over: shards of them give sums that are added later."""
    f = Function(sample(name))
    sums = derivatives.linear(name)[0] and not found.is_alias(name)
    if not sums or any(t.dtype.kind != "float" for t in f.types):
        return frozenset()
    if not found.adds_up(f):
        return frozenset()
    # What something else is done along as well (a softmax, say) is no mere sum.
    others = [t for at, t in enumerate(f.types) if at not in derivatives.linear(name)[0]]
    gone = {n for n in found.mixed(name) if n not in f.node.result.type}
    return frozenset(n for n in gone if not any(n in t for t in others))


def _is_right_on_shards(entry, axis):
    try:
        node = applied(entry, split=axis)
    except InputError:
        return False
    if not any(v.type.is_sharded for v in node.operands):
        return False
    graph, whole = node.graph, applied(OPS[entry.name], on_mesh=True).graph
    for g, made in ((graph, node), (whole, next(iter(whole.walk_back())))):
        for number, value in enumerate(made.results):
            g.set_output(f"y{number}", value)
    for seed in range(3):
        inputs = Function(node).inputs(seed)
        wanted = ReferenceBackend().compile(whole).run({}, inputs)
        made_ = simulate(graph, {}, inputs).outputs
        for name, data in wanted.items():
            assert np.allclose(np.asarray(made_[name], float), np.asarray(data, float), atol=1e-9)
    return True


CHECKS = (
    _mixes,
    _elementwise,
    _linear,
    _alias,
    _residual,
    _homogeneous,
    _normalises,
    _domain,
    _commutative,
    _roles,
    _moves,
    _attends,
    _collective,
    _routing,
    _index,
    _sizes,
    _attributes,
    _shares,
)


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_row_says_is_what_the_meaning_does(name):
    for check in CHECKS:
        check(OPS[name])


def _flags(entry):
    names = ("elementwise", "logical", "alias", "blocks_gradient", "normalises", "chooses",
             "assigns_slots", "attends", "recurs", "commutative", "places")  # fmt: skip
    for name in names:
        yield name, replace(entry, **{name: not getattr(entry, name)})
    if len(entry.linear) > 1:
        yield "jointly", replace(entry, jointly=not entry.jointly)


def _choices(entry):
    for name, values in (
        ("domain", tuple(Domain)),
        ("collective", (None, *CollectiveKind)),
        ("moves", (None, *RowMove)),
    ):
        for value in values:
            if value is not getattr(entry, name):
                yield f"{name}={value}", replace(entry, **{name: value})


def _operands(entry):
    """Yield rows that say something else of one operand."""
    kept, count = entry.residual, len(entry.operands)
    yield "residual result", replace(entry, residual=replace(kept, result=not kept.result))
    if kept.of:
        yield "residual of", replace(entry, residual=replace(kept, of=()))
    for i in range(count):
        yield f"linear {i}", replace(entry, linear=_toggled(entry.linear, i))
        others = Residual(_toggled(kept.operands, i), kept.result, kept.of)
        yield f"residual {i}", replace(entry, residual=others)
        yield f"roles {i}", replace(entry, roles=_other_roles(entry, i))
        yield f"degree {i}", replace(entry, homogeneous=_other_degree(entry, i))
    if count > 1:
        law = entry.homogeneity
        yield "alike", replace(entry, homogeneous=replace(law, alike=not law.alike))


def _toggled(of, i):
    return tuple(sorted({*of} ^ {i}))


def _other_roles(entry, i):
    given = [entry.role(n) for n in range(len(entry.operands))]
    given[i] = Role.GAIN if given[i] is not Role.GAIN else Role.BIAS
    return tuple(given)


def _other_degree(entry, i):
    law = entry.homogeneity
    given = list(law.degrees)
    given[i] = 3.0 if given[i] is None else None
    return Homogeneity(tuple(given), law.alike)


def _rules(entry):
    """Yield rows that lack a rule, or have another one."""
    for name in ("local", "sizes", "index", "sharding"):
        if getattr(entry, name) is not None:
            yield f"no {name}", replace(entry, **{name: None})
    if entry.mixes is not mixes_none:
        yield "no mixes", replace(entry, mixes=mixes_none)
        blind = {n for n in found.mixed(entry.name) if applies(entry, n)}
        if entry.sharding not in (None, by_place) and blind:
            yield "other sharding", replace(entry, sharding=by_place)
    if entry.index is not None:
        index = entry.index
        yield "index strict", replace(entry, index=replace(index, strict=not index.strict))
        yield (
            "index below",
            replace(entry, index=IndexOperand(index.operand, lambda _: 3, index.strict)),
        )
    for name, spec in entry.attrs.items():
        for flag in ("pins", "shrinks") if spec.kind == "int" else ("pins",):
            changed = replace(spec, **{flag: not getattr(spec, flag)})
            yield f"{name} {flag}", replace(entry, attrs={**entry.attrs, name: changed})


@cache
def applies(entry, axis):
    """Whether a rule that lets everything lie split takes `axis` split, and has it wrong."""
    mutant = replace(entry, sharding=by_place)
    try:
        applied(mutant, split=axis)
        _is_right_on_shards(mutant, axis)
    except InputError:
        return False
    except WRONG:
        return True
    return False


def mutants(entry):
    """Yield rows that differ from `entry` in one trait."""
    for some in (_flags, _choices, _operands, _rules):
        yield from some(entry)


def _is_found(mutant):
    try:
        for check in CHECKS:
            check(mutant)
    except WRONG:
        return True
    return False


@pytest.mark.parametrize("name", KNOWN)
def test_every_other_row_is_refuted(name):
    alive = [what for what, mutant in mutants(OPS[name]) if not _is_found(mutant)]
    assert not alive


def test_what_is_opaque_has_no_meaning_and_no_trait_but_to_mix_all():
    (name,) = set(OPS) - set(KNOWN)
    entry = OPS[name]
    plain = OpDef(entry.name, entry.doc, entry.operands, entry.infer)
    graph = Graph()
    x = graph.input("x", tensor(F32, a=2, b=3))
    node = graph.append(name, [x], {"into": (("c", 4),)})
    graph.set_output("y", node.result)
    assert set(entry.mixes(node.operands, node.attrs)) == {"a", "b"}
    stated = ("attrs", "declared", "meaning", "results", "mixes", "variadic", "opaque")
    for trait in fields(OpDef):
        if trait.name not in stated:
            assert getattr(entry, trait.name) == getattr(plain, trait.name)
    with pytest.raises(InputError, match="computed by its function alone"):
        ReferenceBackend().compile(graph).run({}, {"x": np.ones((2, 3))})
