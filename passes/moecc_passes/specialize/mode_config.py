"""The settings of a mode for routed layers, and their record in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moecc.ir.attributes import Policy
from moecc.ir.graph import Graph
from moecc_passes.inputs import is_decoder

ATTRIBUTE = "routing"
"""The graph attribute that stores the settings of its modes."""

UNSAID = "as-is"
"""The value, for options with ``none`` among their words, that leaves a layer unchanged."""

ASSIGNMENT = (
    "capacity_factor", "convention", "rounding", "multiple", "minimum", "cap", "groups",
    "group_size", "order",
)  # fmt: skip
"""Settings that are attributes of ``assign_slots``."""


@dataclass(frozen=True)
class ModeConfig:
    """The settings of one mode; None leaves a layer unchanged.

    Attributes:
      capacity_factor: the capacity factor.
      dropless: whether there is no bound.
      convention: what the factor multiplies.
      rounding: how the capacity is rounded.
      multiple: what it is raised to a multiple of.
      minimum: its least value.
      cap: whether it is at most the tokens of a group.
      groups: the number of token groups.
      group_size: the tokens of a group.
      decoder_group_size: that of the decoder of an encoder-decoder, where it differs.
      order: the order of filling.
      policy: which choices after the first are kept.
      threshold: what the policy compares gates with.
      padding_mask: whether padding is detected, and gets no slot.
      priority: whether tokens are assigned slots by probability.
      after_drop: ``keep`` gates unchanged, or ``rescale`` the remaining ones.
      jitter: the half width of the factors on the router's input.
      input_dropout: the dropout rate of the router's input.
      router_noise: the standard deviation of the noise on the logits.
      dropout: the dropout rate of outputs of sublayers and of dense hidden values.
      expert_dropout: the dropout rate of the experts' hidden values.
    """

    capacity_factor: float | None = None
    dropless: bool | None = None
    convention: str | None = None
    rounding: str | None = None
    multiple: int | None = None
    minimum: int | None = None
    cap: bool | None = None
    groups: int | None = None
    group_size: int | None = None
    decoder_group_size: int | None = None
    order: str | None = None
    policy: Policy | None = None
    threshold: float | None = None
    padding_mask: bool | None = None
    priority: bool | None = None
    after_drop: str | None = None
    jitter: float | None = None
    input_dropout: float | None = None
    router_noise: float | None = None
    dropout: float | None = None
    expert_dropout: float | None = None

    @classmethod
    def of(cls, item: object) -> ModeConfig:
        """Return the settings among the fields of a pass."""
        named = {f.name: getattr(item, f.name) for f in fields(cls)}
        return cls(**{n: v for n, v in named.items() if v != UNSAID})

    def over(self, other: ModeConfig) -> ModeConfig:
        """Return these settings, completed by those of `other`."""
        mine, rest = self.non_default(), other.non_default()
        if "groups" in mine:
            rest = {n: v for n, v in rest.items() if not n.endswith("group_size")}
        if "group_size" in mine:
            rest.pop("groups", None)
        return ModeConfig(**{**rest, **mine})

    def at(self, loc: str) -> ModeConfig:
        """Return the settings for a layer at `loc`: decoders may have other groups."""
        if self.decoder_group_size is None:
            return self
        size = self.decoder_group_size if is_decoder(loc) else self.group_size
        return replace(self, group_size=size, decoder_group_size=None)

    def non_default(self) -> dict[str, Any]:
        """Return the settings that are not None, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: v for n, v in named.items() if v is not None}

    def assignment(self) -> dict[str, Any]:
        """Return the attributes of ``assign_slots`` that the settings determine."""
        attrs = {n: v for n, v in self.non_default().items() if n in ASSIGNMENT}
        if self.group_size:
            attrs["groups"] = 1
        elif self.groups:
            attrs["group_size"] = 0
        if self.dropless:
            attrs |= {"slots": "ragged", "capacity_factor": 0.0}
        elif self.capacity_factor is not None:
            attrs["slots"] = "capacity"
        return attrs


def recorded(graph: Graph, mode: str) -> ModeConfig:
    """Return the settings of `mode` recorded in `graph`; empty if there are none."""
    modes = graph.attrs.get(ATTRIBUTE)
    found = modes.get(mode) if isinstance(modes, Mapping) else None
    if not isinstance(found, Mapping):
        return ModeConfig()
    known = {f.name for f in fields(ModeConfig)}
    return ModeConfig(**{n: v for n, v in found.items() if n in known})


def record(graph: Graph, **modes: ModeConfig) -> None:
    """Record the settings of modes in `graph`."""
    graph.attrs[ATTRIBUTE] = {name: settings.non_default() for name, settings in modes.items()}
