"""The options of ``upcycle``, and properties that follow from them alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from moecc.ir.gates import convention
from moecc_passes.upcycle.gates import GateLaw

Gates = Literal[
    "renormalised", "top-k-softmax", "softmax", "sigmoid-renormalised", "sigmoid", "switch",
    "sparsemixer", "ones",
]  # fmt: skip
FITTED = ("centroids", "ridge")
"""The values of ``router-init`` that read statistics."""

Routing = Literal["token-choice", "prototypes", "hash", "expert-choice", "soft"]


@dataclass(frozen=True)
class UpcycleOptions:
    """The options of ``upcycle``."""

    experts: Annotated[int, "N, the experts stored"] = 8
    top_k: Annotated[int, "k, the experts that a token goes to"] = 2
    layers: Annotated[
        str,
        "all, nowhere, every:N, first:N|half, last:N|half, middle:N, a list 3,7,11, or a glob",
    ] = "all"
    granularity: Annotated[int, "G, the slices of a block that make up one virtual group"] = 1
    split: Annotated[
        Literal["none", "index", "random", "activation"],
        "the neurons are divided among the experts, a part each, of which a token gets top-k: by "
        "number, at random, or by what is active together (CMoE; convert --capture)",
    ] = "none"
    pad: Annotated[
        int,
        "0: neurons that do not divide are rejected; n: neurons that add nothing are added until "
        "each expert has a multiple of n",
    ] = 0
    shared: Annotated[float, "the share of the neurons that a shared expert keeps"] = 0.0
    shared_gate: Annotated[
        Literal["sigmoid", "none"],
        "what the shared expert is multiplied by: the sigmoid of a vector's product with the "
        "token, ½ at first and made up for, or nothing",
    ] = "sigmoid"
    gates: Annotated[
        Gates, "the gate convention; top-k-softmax, of the chosen, is renormalised by another name"
    ] = "renormalised"
    gate_scale: Annotated[float, "what the gates are multiplied by (routed scaling factor)"] = 1.0
    scale_placement: Annotated[
        Literal["down", "up-down", "cube-root"], "where the factor that gates ask for is put"
    ] = "down"
    init: Annotated[Literal["copy", "noise", "drop"], "how copies are made to differ"] = "copy"
    sources: Annotated[
        str, "models of convert --experts, one a copy: base,a,b; empty: all are of the source"
    ] = ""
    rest: Annotated[
        Literal["base", "mean"], "sources: where all else comes from, or the mean of them"
    ] = "base"
    noise_std: Annotated[float, "init=noise: the standard deviation"] = 0.01
    noise: Annotated[
        Literal["relative", "absolute"], "init=noise: whether std is in units of the tensor's own"
    ] = "relative"
    drop_ratio: Annotated[float, "init=drop: the share of neurons drawn anew"] = 0.5
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
    router_std: Annotated[float, "their standard deviation"] = 0.02
    router_ridge: Annotated[
        float, "router-init=ridge: the strength, in units of the mean variance of the input"
    ] = 0.01
    slots: Annotated[Literal["ragged", "capacity"], "dropless, or a bound on rows an expert"] = (
        "ragged"
    )
    capacity_factor: Annotated[float, "slots=capacity: the capacity factor"] = 1.25
    groups: Annotated[int, "slots=capacity: the token groups that capacity counts in"] = 1
    routing: Annotated[
        Routing,
        "token-choice; prototypes: one expert from each of top-k groups (M6-T); hash: the token's "
        "id decides; and in encoders only expert-choice, where experts choose tokens, and soft, "
        "where they get averages of tokens",
    ] = "token-choice"
    balance_bias: Annotated[
        bool, "a bias [expert] that takes part in the choice alone, for loss-free balancing"
    ] = False
    soft_slots: Annotated[int, "routing=soft: the slots of an expert"] = 1
    decoder_layers: Annotated[
        str | None, "layers for the decoder of an encoder-decoder; none: as layers says"
    ] = None
    extra_ffn: Annotated[
        Literal["none", "before", "after"],
        "a dense sublayer beside each sparse one; adds 0 at first",
    ] = "none"
    expert_bias: Annotated[
        Literal["none", "multiplicative", "additive"],
        "a vector for each expert before its last matrix; ones or zeros at first",
    ] = "none"

    @cached_property
    def law(self) -> GateLaw:
        """The sum of the gates under these options."""
        # The k parts that a token gets of a split block take the place of one group.
        group = self.top_k if self.is_split else self.granularity
        return GateLaw(
            convention(self.gates).name, self.experts, self.top_k, group,
            self.gate_scale, has_prototypes=self.routing == "prototypes",
        )  # fmt: skip

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
