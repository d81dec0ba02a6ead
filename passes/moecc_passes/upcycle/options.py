"""The options of ``upcycle``, and properties that follow from them alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Literal

from moecc.analysis import FFNBlock, FFNSearch
from moecc.errors import InputError, Problem, UnmatchedError, nearest
from moecc.ir.conventions import Gates as GateConvention
from moecc.ir.conventions import convention
from moecc.ir.moe import SlotOptions
from moecc.rewrite.passes import Bounds, advice, too_many_experts, too_much_capacity
from moecc.support.text import ranges
from moecc.weights.arithmetic import BASE
from moecc_passes.routed import FACTOR, is_decoder

Gates = Literal[
    "renormalised",
    "top-k-softmax",
    "softmax",
    "sigmoid-renormalised",
    "sigmoid",
    "switch",
    "sparsemixer",
    "ones",
]
FITTED = ("centroids", "ridge")
"""The values of ``router-init`` that read statistics."""

POSITIVE = Bounds(0, is_open=True)

Routing = Literal["token-choice", "prototypes", "hash", "expert-choice", "soft"]


@dataclass(frozen=True)
class GateLaw:
    """The sum of the gates under one convention.

    Attributes:
      convention: the gate convention, as in ``route``.
      experts: N, the stored experts.
      top_k: k, the experts a token goes to.
      granularity: G, the slices of the dense block that make up one group.
      gate_scale: the factor of ``route`` on the gates.
      has_prototypes: whether the experts are k groups with a softmax and one choice each.
    """

    convention: GateConvention
    experts: int
    top_k: int
    granularity: int = 1
    gate_scale: float = 1.0
    has_prototypes: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether the sum of the gates is the same for every router."""
        return convention(self.convention).sum_is_constant(self.experts, self.top_k)

    @property
    def total(self) -> float:
        """The sum of the gates; if it is not constant, that of a zero router."""
        # Each prototype is one of k groups with its own softmax, so the sum is k times as large.
        choices = self.top_k**2 if self.has_prototypes else self.top_k
        return convention(self.convention).zero_router_sum(self.experts, choices) * self.gate_scale

    @property
    def weight_scale(self) -> float:
        """The factor s = G / Σ w that an expert's matrices take together."""
        return self.granularity / self.total

    @property
    def bias_scale(self) -> float:
        """1 / Σ w, the factor that an output bias takes in every expert."""
        return 1 / self.total


@dataclass(frozen=True)
class UpcycleOptions:
    """The options of ``upcycle``."""

    experts: Annotated[int, "number of experts N"] = 8
    top_k: Annotated[int, "experts per token k"] = 2
    layers: Annotated[
        str,
        "all, nowhere, every:N, first:N|half, last:N|half, middle:N, a list 3,7,11, or a glob",
    ] = "all"
    granularity: Annotated[int, "number G of slices of a block that make up one virtual group"] = 1
    split: Annotated[
        Literal["none", "index", "random", "activation"],
        "the neurons are divided among the experts, a part each, of which a token gets top-k: by "
        "number, at random, or by what is active together (CMoE; convert --capture)",
    ] = "none"
    pad: Annotated[
        int,
        "0: neurons that do not divide are rejected; n: neurons that add nothing are added until "
        "each expert has a multiple of n",
        # Kernels ask for multiples of 8 to 256.
        Bounds(0, 1 << 12, is_closed=True),
    ] = 0
    shared: Annotated[float, "share of the neurons in a shared expert", Bounds(0, 1)] = 0.0
    shared_gate: Annotated[
        Literal["sigmoid", "none"],
        "what the shared expert is multiplied by: the sigmoid of a vector's product with the "
        "token, ½ at first and made up for, or nothing",
    ] = "sigmoid"
    gates: Annotated[Gates, "gate convention; top-k-softmax is another name of renormalised"] = (
        "renormalised"
    )
    gate_scale: Annotated[float, "factor on the gates (routed scaling factor)", POSITIVE] = 1.0
    scale_placement: Annotated[
        Literal["down", "up-down", "cube-root"],
        "matrices that take the factor which the gates require",
    ] = "down"
    init: Annotated[Literal["copy", "noise", "drop"], "method that makes the copies differ"] = (
        "copy"
    )
    sources: Annotated[
        str, "models of convert --experts, one per copy: base,a,b; empty: the source alone"
    ] = ""
    rest: Annotated[
        Literal["base", "mean"], "sources: model of all other weights, or their mean"
    ] = "base"
    noise_std: Annotated[float, "init=noise: standard deviation", Bounds(0)] = 0.01
    noise: Annotated[
        Literal["relative", "absolute"],
        "init=noise: whether noise-std is relative to the tensor's own standard deviation",
    ] = "relative"
    drop_ratio: Annotated[
        float, "init=drop: share of the neurons that are redrawn", Bounds(0, 1, is_closed=True)
    ] = 0.5
    router_init: Annotated[
        Literal[
            "normal",
            "truncated-normal",
            "uniform",
            "zero",
            "logit-std",
            "switch",
            "centroids",
            "ridge",
        ],
        "the router's weights; truncated-normal is cut at 3 std; logit-std: normal with the std "
        "router-std / √embed, so that the logits of a normalised input have router-std; switch: "
        "the same, cut at 2 std; centroids, ridge: from statistics, with logits of router-std: of "
        "the texts, one an expert, or of the neurons of a split",
    ] = "normal"
    router_std: Annotated[float, "standard deviation of the router's weights", Bounds(0)] = 0.02
    router_ridge: Annotated[
        float,
        "router-init=ridge: regularisation, relative to the mean variance of the input",
        POSITIVE,
    ] = 0.01
    slots: Annotated[
        Literal["ragged", "capacity"], "dropless, or a capacity that bounds the rows of an expert"
    ] = "ragged"
    capacity_factor: Annotated[float, "slots=capacity: capacity factor", FACTOR] = 1.25
    groups: Annotated[int, "slots=capacity: number of token groups", Bounds(1)] = 1
    routing: Annotated[
        Routing,
        "token-choice; prototypes: one expert from each of top-k groups (M6-T); hash: the token's "
        "id decides; and in encoders only expert-choice, where experts choose tokens, and soft, "
        "where they get averages of tokens",
    ] = "token-choice"
    balance_bias: Annotated[
        bool, "add a bias [expert] to the choice alone, for loss-free balancing"
    ] = False
    soft_slots: Annotated[int, "routing=soft: slots per expert", Bounds(1)] = 1
    decoder_layers: Annotated[
        str | None, "layers of the decoder of an encoder-decoder; none: as `layers`"
    ] = None
    extra_ffn: Annotated[
        Literal["none", "before", "after"],
        "dense sublayer beside each sparse one, which adds 0 at first",
    ] = "none"
    expert_bias: Annotated[
        Literal["none", "multiplicative", "additive"],
        "vector of each expert before its last matrix, ones or zeros at first",
    ] = "none"

    @cached_property
    def law(self) -> GateLaw:
        """The sum of the gates under these options."""
        # The k parts that a token gets of a split block take the place of one group.
        group = self.top_k if self.is_split else self.granularity
        return GateLaw(
            convention(self.gates).name,
            self.experts,
            self.top_k,
            group,
            self.gate_scale,
            has_prototypes=self.routing == "prototypes",
        )

    @property
    def is_split(self) -> bool:
        """Whether every neuron is stored once, in one of the experts."""
        return self.split != "none"

    @property
    def slices(self) -> int:
        """The parts that a dense block is cut into."""
        return self.experts if self.is_split else self.granularity

    def padding(self, width: int, shared: int) -> int:
        """Return how many neurons are added to a block of `width`, `shared` of which are shared."""
        return -(width - shared) % (self.slices * self.pad) if self.pad else 0

    @property
    def is_fitted(self) -> bool:
        """Whether the router's weights follow from statistics."""
        return self.router_init in FITTED

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that the copies come from; empty if all are of the source."""
        return tuple(self.sources.split(",")) if self.sources else ()

    @property
    def is_bounded(self) -> bool:
        """Whether an expert takes a bounded number of rows."""
        return self.routing == "expert-choice" or self.slots == "capacity"

    @property
    def assignment(self) -> SlotOptions:
        """The attributes of ``assign_slots``."""
        if not self.is_bounded:
            return {"slots": self.slots}
        factor, groups = self.capacity_factor, self.groups
        return {"slots": self.slots, "capacity_factor": factor, "groups": groups}

    @property
    def router_is_zero(self) -> bool:
        """Whether all experts have equal logits."""
        return self.router_init == "zero" or self.router_std == 0


# The selection of layers: the option ``layers`` of ``upcycle``.
#
# ``all``; ``every:4`` is layers 3, 7, 11 … as Hugging Face's ``decoder_sparse_step`` counts;
# ``first:half``, ``last:half``, ``first:6``, ``last:6``, ``middle:6``; a list ``3,7,11``; a glob
# over locations, ``layers.1*.ffn``; or ``nowhere``.

FORMS = (
    "all, nowhere, every:N, first:N, first:half, last:N, last:half, middle:N, a list 3,7,11, "
    "or a glob layers.1*.ffn"
)

_COUNT = re.compile(r"(every|first|last|middle):([0-9]{1,9}|half)\Z")
_LIST = re.compile(r"[0-9]{1,9}(?:,[0-9]{1,9})*\Z")


def check_layers(spec: str, option: str = "layers") -> Problem | None:
    """Return the problem of `spec` alone, or None; `option` is the name of the option."""
    if spec in ("all", "nowhere") or _LIST.match(spec):
        return None
    match = _COUNT.match(spec)
    if match is None:
        if any(c in spec for c in "*?[.") and ":" not in spec:
            return None
        return Problem("not a selection of layers", option, expected=FORMS, found=spec)
    word, count = match.groups()
    if word in ("every", "middle") and count == "half":
        return Problem(f"{word}:half cannot be read", option, expected=FORMS, found=spec)
    if count.strip("0") == "":
        return Problem(f"{word}:0 selects no layer", option, expected=FORMS, found=spec)
    return None


def choose(search: FFNSearch, spec: str, decoder_spec: str | None) -> list[FFNBlock]:
    """Return the blocks that the options ``layers`` and ``decoder-layers`` name.

    Args:
      search: the blocks of a graph, and the rejected candidates.
      spec: which layers; with `decoder_spec`, of all but the decoder of an encoder-decoder.
      decoder_spec: the layers of that decoder; None if `spec` is for both stacks.

    Raises:
      InputError: a listed layer does not exist or has no block, or there is no such decoder.
    """
    if decoder_spec is None:
        return select(search.blocks, spec, _total(search))
    stacks = [_stack(search, decoder) for decoder in (False, True)]
    if decoder_spec != "nowhere" and not _total(stacks[1]):
        raise InputError(
            "decoder-layers is about the decoder of an encoder-decoder",
            expected="layers located under decoder.layers",
            found=f"decoder-layers={decoder_spec}, and no such layer",
            hint="use layers for a model with one stack",
        )
    blocks = select(stacks[0].blocks, spec, _total(stacks[0]))
    return [*blocks, *select(stacks[1].blocks, decoder_spec, _total(stacks[1]))]


def _stack(search: FFNSearch, decoder: bool) -> FFNSearch:
    return FFNSearch(
        [b for b in search.blocks if is_decoder(b.loc) == decoder],
        [r for r in search.refusals if is_decoder(r.loc) == decoder],
    )


def _total(search: FFNSearch) -> int:
    """Return the number of layers, from the highest number in a location."""
    layers = [*(b.layer for b in search.blocks), *(r.layer for r in search.refusals)]
    return max((n for n in layers if n is not None), default=len(search.blocks) - 1) + 1


def select(blocks: Sequence[FFNBlock], spec: str, total: int) -> list[FFNBlock]:
    """Return the blocks that `spec` selects.

    Args:
      blocks: the blocks found, in order.
      spec: one of the forms above.
      total: the number of layers of the model, sparse and odd ones included.

    Raises:
      UnmatchedError: a listed layer does not exist, or has no block.
    """
    numbered = [(i if b.layer is None else b.layer, b) for i, b in enumerate(blocks)]
    if _LIST.match(spec):
        listed = {int(part) for part in spec.split(",")}
        dense = {n for n, _ in numbered}
        if not listed <= dense:
            raise UnmatchedError(
                "no feed-forward block to convert in layer "
                f"{ranges(sorted(listed - dense)) or 'none'}",
                expected=f"layers with a dense block: {ranges(sorted(dense)) or 'none'}",
                found=f"layers={spec}",
            )
        return [block for n, block in numbered if n in listed]
    if spec in ("all", "nowhere"):
        return list(blocks) if spec == "all" else []
    match = _COUNT.match(spec)
    if match is None:
        return [b for b in blocks if fnmatchcase(b.loc, spec)]
    word, text = match.groups()
    count = total // 2 if text == "half" else int(text)
    if word == "every":
        return [b for n, b in numbered if n % count == count - 1]
    if word == "first":
        return [b for n, b in numbered if n < count]
    if word == "middle":
        # As in flaxformer: with 4 of 12 these are layers 4 to 7.
        return [b for n, b in numbered if total - count <= 2 * n < total + count]
    return [b for n, b in numbered if n >= total - count]


# What ST-MoE advises against among the options of ``upcycle``.

LEAST_STD, MOST_STD = 1e-3, 0.2
"""Standard deviations of a router's weights: Switch's are 0.01 for a width of 1024."""

LEAST_LOGIT_STD, MOST_LOGIT_STD = 0.03, 3.0
"""Those of its logits: Switch's initialisation has √0.1."""


def unknown_models(
    models: Sequence[str], names: Sequence[str], option: str = "sources"
) -> list[Problem]:
    """Return a problem for each of `models` that is neither the source nor in `names`."""
    return [
        Problem(
            "there is no model of this name",
            option,
            " or ".join((BASE, *names)),
            name,
            nearest(name, names) or "name it: --experts NAME=DIR",
        )
        for name in dict.fromkeys(models)
        if name not in (BASE, *names)
    ]


def lints(item: UpcycleOptions) -> Iterator[Problem]:
    """Yield the lints of the options."""
    yield from too_many_experts(item.experts, "experts")
    bound = item.capacity_factor if item.is_bounded else None
    yield from too_much_capacity(bound, item.experts, "capacity-factor")
    if item.router_init != "zero" and item.routing not in ("hash", "soft"):
        is_of_logits = item.router_init in ("logit-std", "switch", *FITTED)
        least, most = (LEAST_LOGIT_STD, MOST_LOGIT_STD) if is_of_logits else (LEAST_STD, MOST_STD)
        if not least <= item.router_std <= most:
            yield advice(
                f"the router's {'logits' if is_of_logits else 'weights'} begin far from those of "
                "the paper",
                "router-std",
                "section 6.2",
                expected=f"{least:g} to {most:g}; router-init=switch",
                value=item.router_std,
            )
    if item.top_k > 1 and item.gates in ("softmax", "switch") and item.routing == "token-choice":
        yield advice(
            "gates of several experts are not renormalised over those chosen",
            "gates",
            "appendix G",
            expected="renormalised",
            value=item.gates,
        )
