"""Pages of the documentation of which a part is written by a program, between two markers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import InputError


@dataclass(frozen=True)
class WrittenPart:
    """A part of a page.

    Attributes:
      name: what it is called in its markers, in one word.
      module: what writes it, ``python -m MODULE PAGE``.
      render: returns it as Markdown.
    """

    name: str
    module: str
    render: Callable[[], str]

    @property
    def begin(self) -> str:
        """The line before it."""
        return f"<!-- begin {self.name}: written by python -m {self.module} -->"

    @property
    def end(self) -> str:
        """The line after it."""
        return f"<!-- end {self.name} -->"

    def replace(self, page: str) -> str:
        """Return `page` with this part written anew between its markers.

        Raises:
          InputError: the page lacks a marker.
        """
        before, begin, rest = page.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not begin or not end:
            what = f"the page has no place for the part {self.name!r}"
            raise InputError(what, expected=f"{self.begin} … {self.end}")
        return f"{before}{begin}\n\n{self.render()}\n\n{end}{after}"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Rewrite the page that the command line names, and return the exit code."""
        parser = argparse.ArgumentParser(description=f"Write the part {self.name!r} of a page.")
        parser.add_argument("page", type=Path)
        page: Path = parser.parse_args(argv).page
        try:
            page.write_text(self.replace(page.read_text("utf-8")), "utf-8")
        except (InputError, OSError) as error:
            print(f"error: {page}: {error}", file=sys.stderr)
            return InputError.exit_code
        return 0
