"""Which layers of a decoder have experts, in every family's spelling.

All become a step and a list of exceptions, as qwen2_moe states them: layer i has experts, counted
from 0, if the step divides i + 1 and i is not listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .reader import KeyProblem, Reader, key_problem

INTERVAL_KEYS = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")


def read_pattern(reader: Reader, style: str, layers: int) -> dict[str, object]:
    """Read the fields `decoder_sparse_step` and `mlp_only_layers`.

    Args:
      reader: the config.
      style: ``all`` (every layer), ``step``, ``leading`` (the first ones are dense) or ``interval``
        (every n-th of a range).
      layers: the number of layers.
    """
    if style == "step":
        step, dense = reader.size("decoder_sparse_step"), _read_layers(reader, "mlp_only_layers")
        return {"decoder_sparse_step": step, "mlp_only_layers": dense}
    if style == "leading":
        first = reader.size("first_k_dense_replace", smallest=0)
        return {"mlp_only_layers": tuple(range(min(first, layers)))}
    if style == "interval":
        return _read_interval(reader, layers)
    return {}


def write_pattern(
    style: str, sparse: Sequence[bool], step: int, dense: Sequence[int]
) -> dict[str, object]:
    """Return the keys for layers that `pattern_checks` does not object to.

    Args:
      style: as for `read_pattern`.
      sparse: for each layer whether it has experts.
      step: the step.
      dense: the layers that are excepted.
    """
    if style == "step":
        return {"decoder_sparse_step": step, "mlp_only_layers": list(dense)}
    if style == "leading":
        return {"first_k_dense_replace": len(sparse) - sum(sparse)}
    if style == "interval":
        found = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
        values = (_interval(sparse) or step, found[0], found[-1])
        return dict(zip(INTERVAL_KEYS, values, strict=True))
    return {}


def layer_checks(dense: tuple[int, ...], layers: int) -> Iterator[KeyProblem]:
    """Yield what is wrong with a list of dense layers."""
    outside = [i for i in dense if not 0 <= i < layers]
    if outside:
        keys = ("mlp_only_layers", "num_hidden_layers")
        yield key_problem("layers that do not exist", f"0 to {layers - 1}", f"{outside[:8]}", *keys)
    if tuple(sorted(set(dense))) != dense:
        what = "not in ascending order without repetition"
        yield key_problem(what, "ascending layers", f"{dense[:8]}", "mlp_only_layers")


def pattern_checks(family: str, style: str, sparse: Sequence[bool]) -> Iterator[KeyProblem]:
    """Yield why a family of a style cannot have experts in the layers that `sparse` says."""
    dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]
    keys = ("mlp_only_layers", "decoder_sparse_step")
    if style == "all" and dense:
        what = f"{family} has experts in every layer; {dense[:8]} would be dense"
        yield key_problem(what, "no dense layer", f"{len(dense)} of them", *keys)
    if style == "leading" and dense != list(range(len(dense))):
        what = f"{family} has dense layers only before the first layer with experts"
        expected = f"layers 0 to {len(dense) - 1}"
        yield key_problem(what, expected, f"{dense[:8]}", "first_k_dense_replace", *keys)
    if style == "interval" and _interval(sparse) is None:
        what = f"{family} has experts in every n-th layer of a range"
        found = f"dense layers {dense[:8]}"
        yield key_problem(what, "every n-th layer", found, *INTERVAL_KEYS, *keys)


def _read_interval(reader: Reader, layers: int) -> dict[str, object]:
    step = reader.size("moe_layer_interval")
    start = reader.size("moe_layer_start_index", smallest=0)
    # The default, -1, stands for the last layer.
    last = reader.value("moe_layer_end_index") in (None, -1)
    end = layers - 1 if last else reader.size("moe_layer_end_index", smallest=0)
    dense = (i for i in range(layers) if (i + 1) % step == 0 and not start <= i <= end)
    return {"decoder_sparse_step": step, "mlp_only_layers": tuple(dense)}


def _interval(sparse: Sequence[bool]) -> int | None:
    """Return n if every n-th layer from the first sparse one to the last is sparse, else None."""
    found = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
    if not found:
        return None
    start, end = found[0], found[-1]
    for step in range(1, len(sparse) + 1):
        if found == [i for i in range(start, end + 1) if (i + 1) % step == 0]:
            return step
    return None


def _read_layers(reader: Reader, key: str) -> tuple[int, ...]:
    found = reader.items(key)
    layers = [layer for layer in found if type(layer) is int]
    if len(layers) != len(found):
        reader.refuse(key, "not a list of layer numbers", expected="whole numbers")
    return tuple(sorted(set(layers)))
