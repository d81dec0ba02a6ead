"""Generate ``docs/passes.md`` from the registry; a test checks that the file is current.

python -m moecc.rewrite.docs docs/passes.md
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from moecc.errors import UsageError
from moecc.rewrite.passes import Pass, options, write
from moecc.rewrite.pipeline import Registry, installed

HEAD = """# Passes

Written by `make docs` from the passes: what each does, what it preserves without options,
whether it is an error that it finds nothing to do (*must match*, unless `--allow-unmatched` is
given), and its options with their defaults. `moecc passes NAME` has the meaning of each option, the
details, and the text of a graph before and after the pass. A pipeline names passes in the order in
which they run: `canonicalize,upcycle{experts=8 top-k=2},cse,dce`. How to write one:
[writing-a-pass.md](writing-a-pass.md).
"""


def render(registry: Registry | None = None) -> str:
    """Return the reference of all passes as Markdown.

    Args:
      registry: the passes; by default the installed ones.
    """
    registry = installed() if registry is None else registry
    return "\n".join([HEAD, *(_section(registry.get(name)) for name in registry.names())])


def _section(cls: type[Pass]) -> str:
    facts = ["*Must match.*"] if cls.must_match else []
    if not any(option.required for option in options(cls).values()):
        facts.append(f"*Preserves* {cls().preserves}.")
    rows = [
        f"`{o.name}`" if o.required else f"`{o.name}={write(o.type, o.default)}`"
        for o in options(cls).values()
    ]
    facts += [f"*Options*: {', '.join(rows)}."] if rows else []
    lines = textwrap.fill(" ".join([_summary(cls), *facts]), 100, break_on_hyphens=False)
    return f"## {cls.name}\n\n{lines}\n"


def _summary(cls: type[Pass]) -> str:
    """Return the first paragraph of the docstring, on one line."""
    # A dataclass without a docstring gets its signature as one.
    text = inspect.cleandoc(cls.__doc__ or "")
    paragraph = text.partition("\n\n")[0]
    if not paragraph or text.startswith(f"{cls.__name__}("):
        paragraph = f"{cls.summary[0].upper()}{cls.summary[1:]}."
    return " ".join(paragraph.replace("``", "`").split())


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
