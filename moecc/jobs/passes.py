"""``moecc passes``: the registry, or one pass with its options."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

from moecc.jobs.command import Load, Report, Spelling
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.rewrite.passes import Pass


def passes(
    name: Annotated[str | None, Spelling("[NAME]", complete="passes")] = None, *, load: Load = ()
) -> Report:
    """List the passes, or show one.

    One pass is shown with its options, their types and defaults, and an example.

    Args:
      name: Pass to show.

    Example:
      moecc passes upcycle
    """
    from moecc.model.open import registry_with

    registry = registry_with(load)
    if name is not None:
        cls = registry.get(name)
        return Report("pass", pass_json(cls), lambda: _pass_text(cls))
    classes = [registry.get(n) for n in registry.names()]
    width = max((len(c.name) for c in classes), default=0)
    return Report(
        "passes",
        {"passes": [pass_json(cls) for cls in classes]},
        lambda: "\n".join(f"{c.name:{width}}  {c.summary}" for c in classes),
    )


def pass_json(cls: type[Pass]) -> JsonDict:
    """Return a pass and its options as JSON values."""
    from moecc.rewrite.passes import describe, options

    return {
        "name": cls.name,
        "summary": cls.summary,
        "must_match": cls.must_match,
        "options": [
            {
                "name": option.name,
                "type": describe(option.type),
                "default": None if option.required else option.default,
                "required": option.required,
                "doc": option.doc,
            }
            for option in options(cls).values()
        ],
    }


def _pass_text(cls: type[Pass]) -> str:
    from moecc.rewrite.passes import describe, options, write

    rows = [f"{cls.name}: {cls.summary}", ""]
    for option in options(cls).values():
        default = "required" if option.required else f"default {write(option.type, option.default)}"
        rows.append(f"  {option.name}={describe(option.type)}  ({default})")
        if option.doc:
            rows.append(f"      {option.doc}")
    if not options(cls):
        rows.append("  no options")
    rows += ["", inspect.getdoc(cls) or ""]
    return "\n".join(rows).rstrip()
