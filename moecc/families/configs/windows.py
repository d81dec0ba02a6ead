"""Sliding windows: the tokens that each layer sees, in every family's spelling."""

from __future__ import annotations

from .reader import Reader

Windows = tuple[int | None, ...]
"""One entry a layer: the number of keys that a query sees, itself included, or None for all."""

LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def read_no_windows(reader: Reader, layers: int) -> Windows:
    """Read the windows of a family that has none."""
    _check_layer_types(reader, (None,) * layers)
    return (None,) * layers


def read_uniform_windows(reader: Reader, layers: int) -> Windows:
    """Read `sliding_window`, the same for every layer (mistral, mixtral)."""
    windows = (reader.optional_size("sliding_window"),) * layers
    _check_layer_types(reader, windows)
    return windows


def read_switched_windows(reader: Reader, layers: int) -> Windows:
    """Read `sliding_window`, used in every layer if `use_sliding_window` (qwen3_moe)."""
    windows = (_switched_window(reader),) * layers
    _check_layer_types(reader, windows)
    return windows


def read_top_windows(reader: Reader, layers: int) -> Windows:
    """Read the windows of qwen2 and qwen3: `layer_types`, else from `max_window_layers` upwards."""
    window = _switched_window(reader)
    first = reader.size("max_window_layers", smallest=0)
    types = _layer_types(reader, layers)
    if types is None:
        return tuple(window if layer >= first else None for layer in range(layers))
    if window is None and any(types):
        hint = "state sliding_window and use_sliding_window, or make every layer full_attention"
        reader.refuse("layer_types", "sliding layers without a window", hint=hint)
    return tuple(window if sliding else None for sliding in types)


def read_agreed_windows(reader: Reader, layers: int) -> Windows:
    """Read the windows of qwen2_moe if transformers 4 and 5 agree about them.

    Version 4 gives the window to every layer and knows no `layer_types`; version 5 gives it to
    every second layer unless `layer_types` says otherwise.
    """
    window = _switched_window(reader)
    types = _layer_types(reader, layers)
    reader.value("max_window_layers")
    if window is None:
        if types is not None and any(types):
            reader.refuse("layer_types", "sliding layers without a window")
        return (None,) * layers
    if types is None or not all(types):
        what = "transformers 4 puts the window on every layer, 5 on the layers of layer_types"
        hint = "set use_sliding_window to false, or layer_types to sliding_attention throughout"
        reader.refuse("use_sliding_window", what, hint=hint)
    return (window,) * layers


def read_typed_windows(reader: Reader, layers: int) -> Windows:
    """Read `sliding_window` and `layer_types`, without which every layer has the window."""
    return typed_windows(reader, (True,) * layers)


def typed_windows(reader: Reader, usual: tuple[bool, ...]) -> Windows:
    """Return the windows of `layer_types`, or where it is absent of the layers that `usual` marks.

    Raises nothing: a list of the wrong length, or one without a window, is recorded.
    """
    window = reader.optional_size("sliding_window")
    types = _layer_types(reader, len(usual))
    if window is None and types is not None and any(types):
        reader.refuse("layer_types", "sliding layers without a window")
    return tuple(window if sliding else None for sliding in types or usual)


def write_windows(windows: Windows, style: str) -> dict[str, object]:
    """Return the keys for `windows` in a family's `style`."""
    window = next((window for window in windows if window is not None), None)
    if style == "none":
        return {}
    if style == "uniform":
        return {"sliding_window": window}
    names = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if style == "typed":
        return {"sliding_window": window, "layer_types": names}
    keys: dict[str, object] = {"use_sliding_window": window is not None, "sliding_window": window}
    if style == "switched":
        return keys
    full = [layer for layer, window in enumerate(windows) if window is None]
    keys["max_window_layers"] = full[-1] + 1 if full else 0
    return {**keys, "layer_types": names}


def _switched_window(reader: Reader) -> int | None:
    if reader.flag("use_sliding_window"):
        return reader.optional_size("sliding_window")
    # Version 5 writes 0 here for qwen2_moe without a window, so the number is ignored.
    reader.value("sliding_window")
    return None


def _layer_types(reader: Reader, layers: int) -> tuple[bool, ...] | None:
    if reader.value("layer_types") is None:
        return None
    found = reader.items("layer_types")
    if "layer_types" in reader.bad:
        return None
    if not all(isinstance(name, str) and name in LAYER_TYPES for name in found):
        expected = "full_attention or sliding_attention for each layer"
        reader.refuse("layer_types", "unknown kind of layer", expected=expected)
        return None
    if len(found) != layers:
        what = f"{len(found)} entries for {layers} layers"
        if "num_hidden_layers" not in reader.bad:
            reader.refuse("layer_types", what, expected=f"{layers} entries")
        return None
    return tuple(LAYER_TYPES[str(name)] for name in found)


def _check_layer_types(reader: Reader, windows: Windows) -> None:
    """Reject `layer_types` that contradict the family's own key.

    transformers ignores the list for these families; other runtimes do not.
    """
    types = _layer_types(reader, len(windows))
    if types is None or types == tuple(window is not None for window in windows):
        return
    what = "this family has the same attention in every layer, but the list states otherwise"
    reader.refuse("layer_types", what, hint="remove the key if the model ran with transformers")
