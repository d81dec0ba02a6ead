"""The command line: one file a subcommand."""

from __future__ import annotations


def entry() -> None:
    """Run as the console script; an interruption while modules load has no traceback, either."""
    try:
        from moecc.cli.main import entry as run
    except BaseException as error:
        # A class that is being made turns the interruption into a RuntimeError.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(
            error.__context__, KeyboardInterrupt
        ):
            raise
        raise SystemExit(130) from None
    run()
