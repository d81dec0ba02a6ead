"""Model families: typed configs, their graphs, and what every format and engine calls their parts.

Everything here is imported on first use, so that the command line starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.families.config import ModelConfig
    from moecc.ir.graph import Graph
    from moecc.types import DType

    FAMILIES: Mapping[str, type[ModelConfig]]


def build(
    config: ModelConfig,
    dtype_of: Callable[[str], DType] | None = None,
    checkpoint: str = "",
    *,
    padding: bool = False,
) -> Graph:
    """Return the graph of `config`, from tokens to logits or hidden states.

    Args:
      config: a typed config of any family.
      dtype_of: the element type of each tensor on disk, by name; float32 by default.
      checkpoint: the path of the weights.
      padding: whether an encoder has an input ``mask``, true where a token is one.
    """
    from moecc.families.building import build_model

    return build_model(config, dtype_of, checkpoint, padding=padding)


def rebuild(attrs: Mapping[str, object], shrink: bool = True) -> Graph:
    """Return the graph of the config in `attrs`, without later rewrites, with float32 weights.

    Args:
      attrs: the attributes of a graph that a family built.
      shrink: whether to make its sizes small; layers, experts and top-k stay.

    Raises:
      InputError: the attributes have no config.
    """
    from moecc.families.building import build_model
    from moecc.families.registry import parse_config

    stated = attrs.get("config")
    config = parse_config(stated if isinstance(stated, Mapping) else {}, "attr config")
    return build_model(config.shrunk() if shrink else config)


def __getattr__(name: str) -> object:
    if name == "FAMILIES":
        from moecc.families.registry import CONFIGS

        return CONFIGS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["FAMILIES", "build", "rebuild"]
