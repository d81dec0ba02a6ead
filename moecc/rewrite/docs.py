"""Generate ``docs/passes.md`` from the registry; a test checks that the file is current.

python -m moecc.rewrite.docs docs/passes.md
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from moecc.errors import UsageError
from moecc.rewrite.passes import Pass, describe, options, write
from moecc.rewrite.pipeline import Registry, installed

HEAD = """# Passes

A pipeline names passes in the order in which they run:
`canonicalize,upcycle{experts=8 top-k=2},cse,dce`. A pass with an asterisk fails where it finds
nothing to do, unless `--allow-unmatched` is given. What a pass preserves is stated for its default
options. `moecc passes NAME` has the details of a pass, and the text of a graph before and after it.
How to write one: [writing-a-pass.md](writing-a-pass.md). `make docs` writes this page from the
passes.
"""


def render(registry: Registry | None = None) -> str:
    """Return the reference of all passes as Markdown.

    Args:
      registry: the passes; by default the installed ones.
    """
    registry = installed() if registry is None else registry
    rows = [_row(registry.get(name)) for name in registry.names()]
    table = [
        "| pass | what it does, what it preserves, and its options with their defaults |",
        "|---|---|",
    ]
    return "\n".join([HEAD, *table, *rows, ""])


def _row(cls: type[Pass]) -> str:
    defaults = options(cls).values()
    preserves = "" if any(option.required for option in defaults) else str(cls().preserves)
    text = [_summary(cls), f"*Preserves*: {preserves}." if preserves else ""]
    for option in defaults:
        default = "" if option.required else f"={write(option.type, option.default)}"
        bounds = "" if option.bounds is None else f", {option.bounds}"
        text.append(f"`{option.name}{default}` ({describe(option.type)}{bounds}): {option.doc}")
    cells = f"`{cls.name}`{' *' if cls.must_match else ''}", "<br>".join(filter(None, text))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


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
