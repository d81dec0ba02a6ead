"""Run a user's program as one of several processes: ``python -m moecc.launch.script FILE ARGS``.

The program ends with its supervisor, and hears that it has computed alone if it never joined.
"""

from __future__ import annotations

import os
import runpy
import sys

from moecc.launch.processes import has_joined, hold_lifeline, process_info


def main(words: list[str]) -> None:
    """Run FILE, ``-m MODULE`` or ``-c CODE`` as Python would, with its arguments."""
    hold_lifeline()
    try:
        _run(words)
    finally:
        _warn()


def _run(words: list[str]) -> None:
    first, *arguments = words
    if first == "-c" and arguments:
        sys.argv = ["-c", *arguments[1:]]
        sys.path[0] = ""
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m" and arguments:
        sys.argv = arguments
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif first.startswith("-"):
        sys.exit(f"error: python {first}: only FILE, -m MODULE and -c CODE can be launched")
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def _warn() -> None:
    """Say that copies have run if this program never joined the others."""
    process = process_info()
    if has_joined() or process is None or process.process or process.processes == 1:
        return
    print(
        f"warning: the program did not join: {process.processes} copies of it ran, each for itself"
        "\n  hint: join(process_info()) of moecc_backends.xla.program, before jax is used",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
