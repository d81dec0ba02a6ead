"""Checks of the options of ``upcycle`` alone: errors and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

from moecc.errors import Problem, nearest
from moecc.ir.gates import convention
from moecc.weights.branches import BASE
from moecc_passes.inputs import is_decoder
from moecc_passes.upcycle.layers import check_layers
from moecc_passes.upcycle.options import UpcycleOptions
from moecc_passes.upcycle.routers import LOOKS_AHEAD, NAMES

RENORMALISED = ("renormalised", "top-k-softmax")
"""Spellings of one convention, see `moecc.ir.gates.SPELLINGS`."""

GATES_OF = {
    "prototypes": (*RENORMALISED, "softmax"),
    "hash": RENORMALISED,
    "expert-choice": RENORMALISED,
    "soft": RENORMALISED,
}
"""The gate conventions of each kind of routing; token choice supports all."""

MOST_EXPERTS = 1 << 14
"""Each expert is a weight of its own on disk: a limit keeps a typo from taking hours."""

MOST_PADDING = 1 << 12
"""Kernels ask for multiples of 8 to 256."""

_WHY = {
    "prototypes": "each prototype chooses by a softmax of its own",
    "hash": "a hash has no scores that gates could be made of",
    "expert-choice": "where experts choose tokens, a token has no best experts",
    "soft": "in a soft mixture no token chooses anything",
}


def problems(item: UpcycleOptions) -> list[Problem]:
    """Return the problems of the options, independent of the model."""
    layers = check_layers(item.layers)
    decoder = check_layers(item.decoder_layers or "all", "decoder-layers")
    spelled = [p for p in (layers, decoder) if p]
    found = (_counts(item), _gates(item), _routing(item), _sources(item), _split(item),
             _out_of_range(item))  # fmt: skip
    return [*(problem for part in found for problem in part), *spelled]


def _counts(item: UpcycleOptions) -> Iterator[Problem]:
    n, k, g = item.experts, item.top_k, item.granularity
    if n < 2:
        yield Problem("a mixture needs at least two experts", "experts", found=str(n))
    if n > MOST_EXPERTS:
        yield Problem("too many experts", "experts", f"at most {MOST_EXPERTS:,}", f"{n:,}",
                      "Switch-C, the largest that was published, has 2,048")  # fmt: skip
    if k > n or k < 1:
        yield Problem(
            "top-k does not suit the experts", "top-k", f"1 <= top-k <= experts={n}", str(k),
            f"store more experts: experts={max(k, 2)}; ST-MoE has top-k=2" if k > n else "top-k=1",
        )  # fmt: skip
    if g < 1:
        yield Problem("granularity must be at least 1", "granularity", found=str(g))
    elif k % g or n % g:
        yield Problem(
            "a token must go to whole virtual groups", "granularity",
            f"G that divides top-k={k} and experts={n}", str(g),
            f"top-k={-(-k // g) * g} experts={max(-(-n // g), -(-k // g)) * g} would do",
        )  # fmt: skip


def _gates(item: UpcycleOptions) -> Iterator[Problem]:
    k, g = item.top_k, item.granularity
    if item.gates == "switch" and k != 1:
        yield Problem("switch routing has one expert a token", "gates", "top-k=1", f"top-k={k}",
                      "gates=softmax weighs several by their probabilities")  # fmt: skip
    row = convention(item.gates)
    if row.max_top_k is not None and k > row.max_top_k:
        yield Problem(f"{row.name} gates exist for one or two experts a token", "gates",
                      f"top-k<={row.max_top_k}", f"top-k={k}", "gates=renormalised takes any top-k"
                      )  # fmt: skip
    if not row.equal_for_equal_logits and g > 1:
        yield Problem(f"{row.name} gates differ among the members of a virtual group",
                      "gates", "granularity=1", f"granularity={g}",
                      "gates=renormalised suits any granularity")  # fmt: skip
    if item.balance_bias and row.score is None:
        yield Problem(f"{item.gates} gates have no score that a bias could be added to",
                      "balance-bias", found=f"gates={item.gates}",
                      hint="gates=sigmoid-renormalised is DeepSeek-V3's")  # fmt: skip


def _routing(item: UpcycleOptions) -> Iterator[Problem]:
    """Yield the options that the kind of routing does not support."""
    kind = item.routing
    if kind == "token-choice":
        return
    allowed = GATES_OF[kind]
    scales = kind == "prototypes" or item.gate_scale == 1
    checks = (
        ("gates", item.gates in allowed, f"gates={allowed[0]}", item.gates),
        ("granularity", item.granularity == 1, "granularity=1", item.granularity),
        ("gate-scale", scales, "gate-scale=1.0", item.gate_scale),
        ("balance-bias", not item.balance_bias, "balance-bias=false", "true"),
    )
    for name, fits, expected, value in checks:
        if not fits:
            yield Problem(_WHY[kind], name, expected, str(value),
                          "routing=token-choice has this option")  # fmt: skip
    if kind == "prototypes" and item.top_k >= 1 and item.experts % item.top_k:
        yield Problem("the prototypes do not divide the experts", "top-k",
                      f"a divisor of experts={item.experts}", str(item.top_k))  # fmt: skip
    if kind == "soft" and item.slots == "capacity":
        yield Problem("a soft mixture drops nothing, so it has no capacity", "slots",
                      found="capacity", hint="soft-slots says how many slots an expert has"
                      )  # fmt: skip
    if kind in LOOKS_AHEAD:
        yield from _decoders(item)


def _sources(item: UpcycleOptions) -> Iterator[Problem]:
    models = item.models
    if not models and item.rest != "base":
        yield Problem("without sources there is nothing to take a mean of", "rest", "base",
                      item.rest, "sources=base,a says which models")  # fmt: skip
    if models and len(models) * item.granularity != item.experts:
        yield Problem(
            "every copy comes from one model", "sources",
            f"experts / granularity = {item.experts}/{item.granularity} names",
            f"{len(models)} names",
            f"experts={len(models) * item.granularity}, or list a model more than once",
        )  # fmt: skip
    if models and item.init != "copy":
        yield Problem("experts of several models are not made to differ", "init", "copy",
                      item.init)  # fmt: skip


def _split(item: UpcycleOptions) -> Iterator[Problem]:
    if item.is_split:
        for name, fits, value in (
            ("granularity", item.granularity == 1, item.granularity),
            ("sources", not item.models, item.sources),
            ("routing", item.routing == "token-choice", item.routing),
        ):  # fmt: skip
            if not fits:
                what = "a split block has each neuron once, in an expert that a token chooses"
                yield Problem(what, name, "the default", str(value))
    if item.is_fitted and item.routing in ("hash", "soft"):
        yield Problem("there is no router to fit", "router-init", "token-choice",
                      f"routing={item.routing}")  # fmt: skip


def unknown_models(item: UpcycleOptions, known: Sequence[str]) -> list[Problem]:
    """Return a problem for each of ``sources`` that is neither the source nor in `known`."""
    return [
        Problem("there is no model of this name", "sources", " or ".join((BASE, *known)), name,
                nearest(name, known) or "name it: --experts NAME=DIR")
        for name in dict.fromkeys(item.models)
        if name not in (BASE, *known)
    ]  # fmt: skip


def _decoders(item: UpcycleOptions) -> Iterator[Problem]:
    what = NAMES[item.routing]
    hint = "ST-MoE (Appendix D) has what looks ahead in encoders only: decoder-layers=nowhere"
    if item.decoder_layers not in (None, "nowhere"):
        yield Problem(f"{what} in a decoder decides about a token by later ones",
                      "decoder-layers", "nowhere", item.decoder_layers, hint)  # fmt: skip
    if is_decoder(item.layers):
        yield Problem(f"{what} in a decoder decides about a token by later ones", "layers",
                      "layers of an encoder", item.layers, hint)  # fmt: skip


def _out_of_range(item: UpcycleOptions) -> list[Problem]:
    checks = (
        ("shared", 0 <= item.shared < 1, "0 <= shared < 1", item.shared),
        ("pad", 0 <= item.pad <= MOST_PADDING, f"0 <= pad <= {MOST_PADDING}", item.pad),
        ("drop-ratio", 0 <= item.drop_ratio <= 1, "0 <= drop-ratio <= 1", item.drop_ratio),
        ("noise-std", item.noise_std >= 0, "noise-std >= 0", item.noise_std),
        ("router-std", item.router_std >= 0, "router-std >= 0", item.router_std),
        ("router-ridge", item.router_ridge > 0, "router-ridge > 0", item.router_ridge),
        ("gate-scale", item.gate_scale > 0, "gate-scale > 0", item.gate_scale),
        ("groups", item.groups >= 1, "groups >= 1", item.groups),
        ("soft-slots", item.soft_slots >= 1, "soft-slots >= 1", item.soft_slots),
        (
            "capacity-factor", item.capacity_factor > 0,
            "capacity-factor > 0", item.capacity_factor,
        ),
    )  # fmt: skip
    hints = {"capacity-factor": "ST-MoE: 1.25 in training, 2.0 at evaluation"}
    return [
        Problem("an option is out of range", name, expected, str(found), hints.get(name))
        for name, fits, expected, found in checks
        if not (fits and isfinite(found))
    ]


def warnings(item: UpcycleOptions) -> list[Problem]:
    """Return warnings of options that are allowed but rarely intended."""
    found = []
    if has_constant_gate(item):
        found.append(
            Problem(
                "the gate of one expert, renormalised, is always 1, so the router gets no "
                "gradient from the model's loss", "top-k", "top-k=2, as ST-MoE has it", "top-k=1",
                "gates=switch is the paper's top-1",
            )
        )  # fmt: skip
    if item.experts & (item.experts - 1):
        found.append(
            Problem("the experts are not a power of two, which meshes and some kernels ask for",
                    "experts", found=str(item.experts))
        )  # fmt: skip
    if item.router_init == "zero" and item.routing == "token-choice":
        found.append(
            Problem("every token has equal logits, so the first experts are always chosen",
                    "router-init", "another, unless the router is trained or noisy first", "zero")
        )  # fmt: skip
    if item.slots == "ragged" and item.routing not in LOOKS_AHEAD:
        for name, value, default in (
            ("capacity-factor", item.capacity_factor, 1.25), ("groups", item.groups, 1)
        ):  # fmt: skip
            if value != default:
                found.append(
                    Problem(f"{name} bounds nothing where slots are ragged", name,
                            found=f"{name}={value}", hint="slots=capacity")
                )  # fmt: skip
    return found


def has_constant_gate(item: UpcycleOptions) -> bool:
    """Return whether a router is to be trained whose one gate is always 1."""
    is_one = item.top_k == 1 and convention(item.gates).renormalised
    return is_one and item.routing in ("token-choice", "prototypes")
