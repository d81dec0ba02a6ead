"""Documentation pages with a generated part between two markers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import InputError


@dataclass(frozen=True)
class GeneratedPart:
    """A generated part of a page.

    Attributes:
      name: its name in the markers, one word.
      module: its generator, ``python -m MODULE PAGE``.
      render: returns the part as Markdown.
    """

    name: str
    module: str
    render: Callable[[], str]

    @property
    def begin(self) -> str:
        """The opening marker."""
        return f"<!-- begin {self.name}: written by python -m {self.module} -->"

    @property
    def end(self) -> str:
        """The closing marker."""
        return f"<!-- end {self.name} -->"

    def replace(self, page: str) -> str:
        """Return `page` with this part regenerated between its markers.

        Raises:
          InputError: the page lacks a marker.
        """
        before, begin, after = page.partition(self.begin)
        _, end, after = after.partition(self.end)
        if not begin or not end:
            fault = f"the page has no markers for the part {self.name!r}"
            raise InputError(fault, expected=f"{self.begin} … {self.end}")
        return f"{before}{begin}\n{self.render()}\n{end}{after}"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Regenerate the part in the page named on the command line, and return the exit code."""
        parser = argparse.ArgumentParser(description=f"Write the part {self.name!r} of a page.")
        parser.add_argument("page", type=Path)
        page: Path = parser.parse_args(argv).page
        try:
            page.write_text(self.replace(page.read_text("utf-8")), "utf-8")
        except (InputError, OSError) as error:
            print(f"error: {page}: {error}", file=sys.stderr)
            return InputError.exit_code
        return 0
