"""The remarks of ``specialize`` on layers that it changed."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.pipeline.passes import Remark
from moecc_passes.inputs import mask_name
from moecc_passes.routed import RoutedLayer
from moecc_passes.specialize.mode_config import ModeConfig


def remarks(
    layers: list[RoutedLayer], settings: ModeConfig, is_decoder: dict[str, bool], mode: str
) -> Iterator[Remark]:
    """Yield remarks on the layers as they are now."""
    bounded = [y for y in layers if y.assignment.slots == "capacity"]
    leaks = [y for y in bounded if is_decoder[y.name] and _looks_ahead(y)]
    if leaks:
        yield Remark(
            leaks[0].name,
            "in a decoder under a capacity the paper's order lets later tokens decide whether a "
            "second choice finds a slot; order=token is strictly causal",
        )
    for layer in bounded:
        attrs = layer.assignment
        fits = attrs.capacity_factor / layer.top_k
        if not layer.experts_choose and attrs.convention == "tokens" and fits < 1:
            yield Remark(layer.name, f"at most {fits:.1%} of the choices find a slot")
    for layer in layers:
        name = mask_name(layer.assigner.loc)
        if name in layer.assigner.graph.inputs and "mask" not in layer.given():
            yield Remark(layer.name, f"routes padding, too; padding-mask=true goes by %{name}")
    if mode == "eval" and settings.policy == "random":
        yield Remark("", "policy=random makes an evaluation random, too; policy=all does not")


def _looks_ahead(layer: RoutedLayer) -> bool:
    attrs = layer.assigner.attrs
    return layer.top_k > 1 and attrs.get("order") == "choice"
