"""Generate ``docs/passes.md`` from the registry; a test checks that the file is current.

python -m moecc.rewrite.docs docs/passes.md
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moecc.errors import UsageError
from moecc.rewrite.passes import Option, Pass, describe, options, write
from moecc.rewrite.pipeline import Registry, installed

HEAD = """# Passes

Written by `make docs` from the passes themselves. `moecc passes NAME` shows a pass with the text of
a graph before and after it. A pipeline names passes in the order in which they run:
`canonicalize,upcycle{experts=8 top-k=2},cse,dce`. A pass that *must match* fails where it finds
nothing to do, unless `--allow-unmatched` is given; each states what it preserves without options.
How to write one: [writing-a-pass.md](writing-a-pass.md).
"""


def render(registry: Registry | None = None) -> str:
    """Return the reference of all passes as Markdown.

    Args:
      registry: the passes; by default the installed ones.
    """
    registry = installed() if registry is None else registry
    classes = [registry.get(name) for name in registry.names()]
    rows = [f"| [`{c.name}`](#{c.name}) | {c.summary} |" for c in classes]
    table = "\n".join(["| pass | what it does |", "|---|---|", *rows])
    return "\n".join([HEAD, table, *(f"\n{_section(c)}" for c in classes)]) + "\n"


def _section(cls: type[Pass]) -> str:
    paragraphs = list(_paragraphs(cls)) or [f"{cls.summary[0].upper()}{cls.summary[1:]}."]
    facts = ["*Must match.*"] if cls.must_match else []
    if not any(option.required for option in options(cls).values()):
        facts.append(f"*Preserves*: {cls().preserves}.")
    parts = [f"## {cls.name}", *paragraphs, " ".join(facts), _list(options(cls).values())]
    return "\n\n".join(part for part in parts if part)


def _list(some: Iterable[Option]) -> str:
    rows = []
    for o in some:
        bounds = "" if o.bounds is None else f", {o.bounds}"
        default = "required" if o.required else f"default `{write(o.type, o.default)}`"
        rows.append(f"* `{o.name}` ({describe(o.type)}{bounds}; {default}): {o.doc}")
    return "\n".join(rows)


def _paragraphs(cls: type[Pass]) -> Iterator[str]:
    """Yield the paragraphs of the docstring, but for literal blocks and the lines before them."""
    # A dataclass without a docstring gets its signature as one.
    text = inspect.cleandoc(cls.__doc__ or "")
    blocks = text.split("\n\n") if not text.startswith(f"{cls.__name__}(") else []
    for block in blocks:
        if not block.endswith("::") and not block.startswith("    "):
            yield block.replace("``", "`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page to the file named on the command line."""
    parser = argparse.ArgumentParser(description="Write the reference of all passes.")
    parser.add_argument("file", type=Path)
    file: Path = parser.parse_args(arguments).file
    try:
        text = render()
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
