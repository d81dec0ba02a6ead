"""``moecc clean``: remove what killed conversions left beside an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from moecc.jobs.command import Report, Spelling


def clean(out: Annotated[Sequence[str], Spelling("OUT…")]) -> Report:
    """Remove what killed conversions left beside outputs.

    An old output that was being replaced is put back if the new one is not there. A conversion that
    is running is left alone. In an object store, the claim of a writer is removed with the files of
    its unfinished upload and their local copy; make sure that no other machine is writing.

    Args:
      out: Output of a conversion, whether it was written or not.

    Example:
      moecc clean smollm2-8x
    """
    import os
    from pathlib import Path

    from moecc.formats.output import clean as clean_output
    from moecc.formats.store import is_address
    from moecc.formats.upload import StoreOutput

    removed = {
        path: StoreOutput(path).clean() if is_address(path) else clean_output(Path(path))
        for path in out
    }
    there = {path for path in out if is_address(path) or os.path.lexists(path)}
    nothing = "nothing was left beside it"
    lines = [
        line
        for path, actions in removed.items()
        for line in actions
        or [f"{path}: {nothing if path in there else f'there is no such output, and {nothing}'}"]
    ]
    return Report("clean", {"outputs": removed}, lambda: "\n".join(lines), is_aside=True)
