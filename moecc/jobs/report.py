"""``moecc report``: runs compared on one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from moecc.jobs.command import Force, Report, SequenceLength, Spelling, check_writable, write_whole


def report(
    runs: Annotated[Sequence[str], Spelling("RUN…")],
    *,
    html: Annotated[str, Spelling("FILE")],
    data: Annotated[str | None, Spelling("DIR")] = None,
    sequence: SequenceLength = 512,
    force: Force = False,
) -> Report:
    """Write a page that compares runs.

    It has curves, held-out losses, loads of experts and alarms; with --data also which tokens go to
    which expert, beside routers that learnt nothing. The page is one file and loads nothing.

    Args:
      runs: Folder that moecc train wrote.
      html: File to write the page to.
      data: Token folder over which the experts are traced.
      sequence: Number of tokens in a sequence of that folder.

    Example:
      moecc report dense sparse --html runs.html --data tokens/heldout
    """
    from moecc.jobs.evaluate import EvaluationSpec
    from moecc.jobs.specialise import specialisation
    from moecc.train.report_page import report_page
    from moecc.train.run import read_run

    check_writable(html, force=force)
    folders = [read_run(run) for run in runs]
    specialised = {}
    if data is not None:
        spec = EvaluationSpec(seq=sequence, batches=8)
        for path, run in zip(runs, folders, strict=True):
            if run.layers:
                specialised[run.name] = specialisation(path, data, spec)
    write_whole(html, report_page(folders, specialised).encode(), force=force)
    facts = {"html": html, "runs": {run.name: run.facts for run in folders}}
    return Report("report", facts, lambda: f"written to {html}", is_aside=True)
