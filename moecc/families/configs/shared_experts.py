"""Shared experts that a config counts: together one expert of so many times the experts' width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .reader import KeyProblem, Reader, key_problem

if TYPE_CHECKING:
    from .moe import MoeConfig

WIDTH = "shared_expert_intermediate_size"


def read_count(
    reader: Reader, key: str, values: Mapping[str, object], *, least: int
) -> dict[str, object]:
    """Return the field of the shared width; None where the config counts none."""
    count, width = reader.size(key, smallest=least), values["expert_intermediate_size"]
    assert isinstance(width, int), "a size"
    return {WIDTH: count * width or None}


def write_count(config: MoeConfig, key: str) -> dict[str, object]:
    """Return the key with the number of shared experts."""
    return {key: (config.shared_expert_intermediate_size or 0) // config.expert_intermediate_size}


def count_checks(config: MoeConfig, key: str) -> Iterator[KeyProblem]:
    """Yield a problem unless the shared width is a multiple of that of the experts."""
    shared, width = config.shared_expert_intermediate_size, config.expert_intermediate_size
    if shared is not None and width > 0 and shared % width:
        what = f"{config.model_type} has shared experts of the experts' own width"
        yield key_problem(what, f"a multiple of {width}", f"{shared} neurons", key)


def refuse_groups(reader: Reader) -> None:
    """Reject experts in groups of which a token may only choose from some."""
    groups, chosen = reader.size("n_group"), reader.size("topk_group")
    if groups != chosen:
        what = "moecc does not restrict a token to some groups of experts"
        reader.refuse("topk_group", what, expected=f"n_group = {groups}, or both 1")
