"""What a mode decides for a routed layer, and where a graph keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moecc.ir.attributes import Policy
from moecc.ir.graph import Graph
from moecc_passes.inputs import is_decoder

ATTRIBUTE = "routing"
"""The attribute of a graph that holds the settings of its modes."""

UNSAID = "as-is"
"""What an option says that has ``none`` among its words, and leaves a layer as it is."""

ASSIGNMENT = (
    "capacity_factor", "convention", "rounding", "multiple", "minimum", "cap", "groups",
    "group_size", "order",
)  # fmt: skip
"""Settings that are attributes of ``assign_slots``."""


@dataclass(frozen=True)
class ModeConfig:
    """The settings of one mode; None leaves a layer as it is.

    Attributes:
      capacity_factor: the capacity factor.
      dropless: whether there is no bound at all.
      convention: what the factor multiplies.
      rounding: how the capacity becomes a whole number.
      multiple: what it is raised to a multiple of.
      minimum: its least value.
      cap: whether it is at most the tokens of a group.
      groups: the number of token groups.
      group_size: the tokens of a group.
      decoder_group_size: that of the decoder of an encoder-decoder, where it differs.
      order: the order of filling.
      policy: which choices after the first are kept.
      threshold: what the policy compares gates with.
      padding_mask: whether padding is told apart, and gets no slot.
      priority: whether tokens take their turns by probability.
      after_drop: ``keep`` gates as they are, or ``rescale`` those that are left.
      jitter: the half width of the factors on the router's input.
      input_dropout: the share of the router's input that is dropped.
      router_noise: the standard deviation of the noise on the logits.
      dropout: the share of what sublayers add, and of dense hidden values, that is dropped.
      expert_dropout: the share of the experts' hidden values that is dropped.
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
        """Return these settings, and those of `other` where these say nothing."""
        return ModeConfig(**{**other.said(), **self.said()})

    def at(self, loc: str) -> ModeConfig:
        """Return the settings for a layer at `loc`: decoders may have other groups."""
        if self.decoder_group_size is None:
            return self
        size = self.decoder_group_size if is_decoder(loc) else self.group_size
        return replace(self, group_size=size, decoder_group_size=None)

    def said(self) -> dict[str, Any]:
        """Return the settings that say something, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: v for n, v in named.items() if v is not None}

    def assignment(self) -> dict[str, Any]:
        """Return the attributes of ``assign_slots`` that they ask for."""
        attrs = {n: v for n, v in self.said().items() if n in ASSIGNMENT}
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
    """Return what `graph` says about `mode`; nothing where it says nothing."""
    modes = graph.attrs.get(ATTRIBUTE)
    found = modes.get(mode) if isinstance(modes, Mapping) else None
    if not isinstance(found, Mapping):
        return ModeConfig()
    known = {f.name for f in fields(ModeConfig)}
    return ModeConfig(**{n: v for n, v in found.items() if n in known})


def record(graph: Graph, **modes: ModeConfig) -> None:
    """Let `graph` say what its modes are."""
    graph.attrs[ATTRIBUTE] = {name: settings.said() for name, settings in modes.items()}
