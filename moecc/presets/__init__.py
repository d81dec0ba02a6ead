"""Published models by name: their configs, from which a graph is built without any weights."""

from __future__ import annotations

import json
from importlib.resources import files

from moecc.errors import UsageError, unknown_name

PREFIX = "preset:"


def preset_names() -> list[str]:
    """Return the names of the presets."""
    names = (f.name for f in files(__name__).iterdir() if f.name.endswith(".json"))
    return sorted(name.removesuffix(".json") for name in names)


def preset_config(name: str) -> dict[str, object]:
    """Return the config.json of a published model.

    Args:
      name: its name, with or without ``preset:``.

    Raises:
      UsageError: there is no such preset.
    """
    name = name.removeprefix(PREFIX)
    if name not in preset_names():
        raise UsageError([unknown_name("preset", name, preset_names())])
    config: dict[str, object] = json.loads((files(__name__) / f"{name}.json").read_text("utf-8"))
    return config
