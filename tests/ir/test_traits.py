"""Traits are proved, not trusted: each is evaluated, and a row that says something else fails.

The second half changes every trait of every row, one at a time, and each change must be found.
"""

from dataclasses import fields, replace
from functools import cache
from math import prod

import numpy as np
import pytest

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
    Product,
    Role,
    RowMove,
)
from moecc.testing import run_reference

from . import evaluated_axes as axes
from . import evaluated_derivatives as derivatives
from . import evaluated_traits as found
from .operations import Function, applied, meaning

WRONG = (AssertionError, ValueError, IndexError, ZeroDivisionError, InputError)
"""What a wrong row leads to: a trait that differs, or a meaning that cannot be evaluated so."""

KNOWN = sorted(name for name, entry in OPS.items() if not entry.opaque)
"""Operations with a meaning that can be evaluated."""


EVALUATED = {
    "elementwise": axes.is_elementwise,
    "logical": axes.is_logical,
    "alias": found.is_alias,
    "blocks_gradient": found.blocks_gradient,
    "normalises": found.normalises,
    "domain": found.domain,
    "commutative": found.commutes,
    "roles": found.roles,
    "moves": found.moves,
    "attends": found.attends,
    "recurs": found.recurs,
    "collective": found.collective,
    "chooses": found.chooses,
    "assigns_slots": found.assigns_slots,
}
"""Traits that are a value, and how each is found."""


def _values(entry, f):
    for trait, evaluate in EVALUATED.items():
        assert getattr(entry, trait) == evaluate(f), trait


def _mixes(entry, f):
    said = set(entry.mixes(f.node.operands, f.node.attrs))
    # A body may do anything, so a scan is taken to mix whatever axes come in.
    if f.node.body is None:
        assert said == found.mixed(f)
    assert found.mixed(f) <= said


def _linear(entry, f):
    assert (entry.linear, entry.jointly) == derivatives.linear(f)


def _residual(entry, f):
    of = entry.residual.of
    assert entry.residual == derivatives.residual(f, of)
    # Operands without a gradient are said only where that makes a difference.
    assert not of or replace(entry.residual, of=()) != derivatives.residual(f)


def _homogeneous(entry, f):
    count, said = len(entry.operands), entry.homogeneity
    together = derivatives.alike(f)
    if together is not None:
        assert said == Homogeneity(together, alike=True)
    else:
        assert said == Homogeneity(derivatives.degrees(f)[:count])


def _places(entry, f):
    has_body = any(spec.kind == "region" for spec in entry.attrs.values())
    assert entry.places == (entry.collective is not None or has_body)


def _index(entry, f):
    index = entry.index
    said = None if index is None else (index.operand, index.below(f.node), index.strict)
    assert said == found.index(f)


def _sizes(entry, f):
    """Where elements are kept and axes not, sizes are products; where some go, it is a cut."""
    rule = None if entry.sizes is None else entry.sizes(f.node)
    if not found.is_alias(f) or entry.elementwise or len(f.types) > 1:
        assert rule is None
        return
    before, after = f.types[0].shape, f.node.result.type.shape
    if before == after:
        assert rule is None
    elif prod(before) == prod(after):
        assert isinstance(rule, Product)
        assert rule.size == prod(rule.parts)
    else:
        assert isinstance(rule, Cut)
        size, made = next((a, b) for a, b in zip(before, after, strict=True) if a != b)
        assert (rule.size, rule.ends[1] - rule.ends[0]) == (size, made)


def _attributes(entry, f):
    """A smaller graph has what a size or an end within one says smaller, and as many experts."""
    for name, spec in entry.attrs.items():
        if spec.kind == "int":
            assert spec.shrinks == (name in _SHRINKING.get(entry.name, ()))
        assert spec.pins == (name in _PINNING.get(entry.name, ())), name


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


def _shares(entry, f):
    """Devices that run the operation on shards give the shards of what it gives on the whole."""
    if entry.places:
        return
    names = dict.fromkeys(a for v in f.node.graph.inputs.values() for a in v.type.names)
    taken = {axis for axis in names if _is_right_on_shards(entry, axis)}
    assert taken or not any(t.names for t in f.types)
    assert _summed(f) <= taken


def _summed(f):
    """Return the axes that a sum runs over: shards of them give sums that are added later."""
    linear = derivatives.linear(f)[0]
    if not linear or found.is_alias(f) or not all(t.dtype.is_float for t in f.types):
        return set()
    if not found.adds_up(f):
        return set()
    # What something else is done along as well (a softmax, say) is no mere sum.
    others = [t for at, t in enumerate(f.types) if at not in linear]
    return {n for n in found.mixed(f) if not any(n in t for t in (f.node.result.type, *others))}


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
        wanted = run_reference(whole, inputs=inputs)
        shares = simulate(graph, {}, inputs).outputs
        for name, data in wanted.items():
            assert np.allclose(np.asarray(shares[name], float), np.asarray(data, float), atol=1e-9)
    return True


CHECKS = (
    _values,
    _mixes,
    _linear,
    _residual,
    _homogeneous,
    _places,
    _index,
    _sizes,
    _attributes,
    _shares,
)


def check(entry):
    """Check that a row says of its operation what the meaning does."""
    for check_part in CHECKS:
        check_part(entry, meaning(entry.name))


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_row_says_is_what_the_meaning_does(name):
    check(OPS[name])


def _choices(entry):
    """Yield rows that have another value of a trait."""
    choices = {
        "domain": Domain,
        "collective": (None, *CollectiveKind),
        "moves": (None, *RowMove),
        "roles": (),  # `_operands` changes one of them
    }
    for name in (*EVALUATED, "places"):
        for value in choices.get(name, (True, False)):
            if value is not getattr(entry, name):
                yield f"{name}={value}", replace(entry, **{name: value})
    if len(entry.linear) > 1:
        yield "jointly", replace(entry, jointly=not entry.jointly)


def _operands(entry):
    """Yield rows that say something else of one operand."""
    kept, law = entry.residual, entry.homogeneity
    roles = [entry.role(i) for i in range(len(entry.operands))]
    yield "residual result", replace(entry, residual=replace(kept, result=not kept.result))
    if kept.of:
        yield "residual of", replace(entry, residual=replace(kept, of=()))
    for i, role in enumerate(roles):
        yield f"linear {i}", replace(entry, linear=_toggled(entry.linear, i))
        others = replace(kept, operands=_toggled(kept.operands, i))
        yield f"residual {i}", replace(entry, residual=others)
        other = Role.GAIN if role is not Role.GAIN else Role.BIAS
        yield f"roles {i}", replace(entry, roles=_exchanged(roles, i, other))
        degree = 3.0 if law.degrees[i] is None else None
        degrees = replace(law, degrees=_exchanged(law.degrees, i, degree))
        yield f"degree {i}", replace(entry, homogeneous=degrees)
    if len(roles) > 1:
        yield "alike", replace(entry, homogeneous=replace(law, alike=not law.alike))


def _toggled(of, i):
    return tuple(sorted({*of} ^ {i}))


def _exchanged(values, i, value):
    return (*values[:i], value, *values[i + 1 :])


def _rules(entry):
    """Yield rows that lack a rule, or have another one."""
    for name in ("local", "sizes", "index", "sharding"):
        if getattr(entry, name) is not None:
            yield f"no {name}", replace(entry, **{name: None})
    if entry.mixes is not mixes_none:
        yield "no mixes", replace(entry, mixes=mixes_none)
        blind = {n for n in found.mixed(meaning(entry.name)) if applies(entry, n)}
        if entry.sharding not in (None, by_place) and blind:
            yield "other sharding", replace(entry, sharding=by_place)
    if (index := entry.index) is not None:
        yield "index strict", replace(entry, index=replace(index, strict=not index.strict))
        yield "index below", replace(entry, index=replace(index, below=lambda _: 3))
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
    for some in (_choices, _operands, _rules):
        yield from some(entry)


def _is_found(mutant):
    try:
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
        run_reference(graph)
