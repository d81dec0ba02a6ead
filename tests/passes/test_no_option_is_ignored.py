"""Every option of the passes of ST-MoE changes what the pass makes of a model."""

from functools import cache

import pytest

from moecc.ir import clone, fingerprint
from moecc.rewrite.passes import Statistics, options
from moecc.rewrite.pipeline import installed

from .model_graphs import apply_passes, imported

SPARSE = "upcycle{experts=4},"
"""What runs before passes on mixtures."""

TABLE = """
upcycle    experts=4
upcycle    top-k=3
upcycle    layers=0
upcycle    granularity=2
upcycle    pad=7
upcycle    split=random               experts=4
upcycle    shared=0.5
upcycle    shared-gate=none           shared=0.5
upcycle    gates=softmax
upcycle    gate-scale=2.0
upcycle    scale-placement=up-down    granularity=2
upcycle    init=noise
upcycle    sources=base,a             experts=2
upcycle    rest=mean                  experts=2 sources=base,a
upcycle    noise-std=0.5              init=noise
upcycle    noise=absolute             init=noise
upcycle    drop-ratio=0.25            init=drop
upcycle    router-init=uniform
upcycle    router-std=0.5
upcycle    router-ridge=0.5           router-init=ridge experts=2
upcycle    slots=capacity
upcycle    capacity-factor=2.0        slots=capacity
upcycle    groups=2                   slots=capacity
upcycle    routing=prototypes
upcycle    balance-bias=true
upcycle    soft-slots=2               routing=soft decoder-layers=nowhere
upcycle    decoder-layers=last:1
upcycle    extra-ffn=before
upcycle    expert-bias=additive
st-moe     experts=4
st-moe     top-k=3
st-moe     layers=all
st-moe     decoder-layers=last:1
st-moe     extra-ffn=before
st-moe     expert-bias=none
st-moe     init=drop
st-moe     train-capacity-factor=1.0  mode=train
st-moe     eval-capacity-factor=4.0   mode=eval
st-moe     train-policy=all           mode=train
st-moe     eval-policy=threshold      mode=eval
st-moe     threshold=0.05             mode=train
st-moe     group-size=8               mode=train
st-moe     decoder-group-size=8       mode=train
st-moe     balance-coef=0.1
st-moe     z-coef=0.1
st-moe     losses=false
st-moe     mode=train
specialize mode=eval
specialize layers=encoder.*           jitter=0.1
specialize capacity-factor=2.0
specialize dropless=true              capacity
specialize convention=assignments     capacity-factor=1.0
specialize rounding=ceil              capacity-factor=1.0
specialize multiple=4                 capacity-factor=1.0
specialize minimum=1                  capacity-factor=1.0
specialize cap=false                  capacity-factor=1.0
specialize groups=2
specialize group-size=8
specialize decoder-group-size=8
specialize order=token
specialize policy=random
specialize threshold=0.05             policy=random
specialize padding-mask=true
specialize priority=true              layers=encoder.*
specialize after-drop=rescale
specialize jitter=0.1
specialize input-dropout=0.1
specialize router-noise=0.1
specialize dropout=0.1
specialize expert-dropout=0.1         capacity-factor=1.0
add-losses balance=k-hot
add-losses balance-coef=0.1
add-losses z-coef=0.1
add-losses importance-coef=0.1
add-losses load-coef=0.1
add-losses load-noise=0.5             load-coef=0.1
add-losses attention-z-coef=0.1
add-losses output-z-coef=0.1
add-losses over=sequence
add-losses layers=mean
add-losses metrics=false
add-losses parts=2
freeze     groups=moe,norm            groups=moe
freeze     only=moe,norm              only=moe
"""
"""A pass, an option with a value that differs from the default, and what else it needs."""

CHANGES = {}
for line in TABLE.split("\n")[1:-1]:
    name, changed, *needs = line.split()
    option, _, value = changed.partition("=")
    CHANGES[name, option] = value, " ".join(needs)

# What is meant to do nothing but allow something.
ALLOWS = {("specialize", "force"), ("add-losses", "replace")}


@cache
def dense():
    """Return a tiny T5: two layers of an encoder, three of a decoder."""
    return imported("t5_gated_untied")


@cache
def made(text):
    """Return the fingerprint of what the passes make, the parts that only say so aside."""
    graph = clone(dense())
    apply_passes(graph, text, models=("a",), statistics=Statistics(("one", "two")))
    for attribute in ("mode", "routing", "losses"):
        graph.attrs.pop(attribute, None)
    return fingerprint(graph)


def texts(name, option):
    """Return the pipelines without and with the option."""
    value, needs = CHANGES[name, option]
    before = "" if name in ("upcycle", "st-moe") else SPARSE
    if needs == "capacity":
        before, needs = "upcycle{experts=4 slots=capacity},", ""
    if name == "st-moe" and option != "layers":
        # Every fourth of so few layers would be none.
        needs = f"layers=every:2 {needs}"
    alone = " ".join(p for p in needs.split() if not p.startswith(f"{option}="))
    plain = f"{before}{name}{{{needs}}}" if needs else f"{before}{name}"
    return plain, f"{before}{name}{{{alone} {option}={value}}}"


@pytest.mark.parametrize(("name", "option"), CHANGES)
def test_an_option_changes_the_graph(name, option):
    plain, changed = texts(name, option)
    if (name, option) == ("st-moe", "layers"):
        plain = "st-moe{layers=last:1}"
    if (name, option) == ("specialize", "mode"):
        plain, changed = (f"st-moe{{layers=all}},specialize{{mode={m}}}" for m in ("train", "eval"))
    assert made(plain) != made(changed)


@pytest.mark.parametrize("name", sorted({n for n, _ in CHANGES}))
def test_all_options_are_tried(name):
    tried = {option for item, option in {*CHANGES, *ALLOWS} if item == name}
    assert tried == {*options(installed().get(name))}
