"""``moecc launch``: run several processes on this machine, or print scripts for clusters."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from moecc.cli.face import add_command
from moecc.cli.heartbeat import Progress


class How(StrEnum):
    """What is launched."""

    local = "local"
    template = "template"


MOST_LOCAL = 64


@dataclass(frozen=True)
class LaunchRequest:
    """The arguments and options of ``moecc launch``."""

    how: Annotated[How, typer.Argument(metavar="local|template", help="Start, or print a script.")]
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="[slurm|xpk] -- COMMAND…",
            help="Of moecc, or: python FILE. For a template, the cluster stands first.",
            show_default=False,
        ),
    ]
    processes: Annotated[
        int,
        typer.Option("-n", "--processes", min=1, max=MOST_LOCAL, help="How many, local."),
    ] = 2
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="Of a template: nodes, or slices of TPUs.")
    ] = 1
    name: Annotated[str, typer.Option("--name", help="Of a template: the job.")] = "moecc"
    step_seconds: Annotated[
        int,
        typer.Option(
            "--step-seconds", min=1, help="A process that makes no step for so long is stuck."
        ),
    ] = 300


def launch(request: LaunchRequest) -> int:
    """Run COMMAND in several processes that compute together, or print a script that would.

    The first process that fails, dies or hangs ends all, with a message.
    """
    if request.how is How.template:
        from moecc.launch.templates import Job, fill_template

        kind, *rest = request.command
        job = Job(_checked(rest), request.name, request.nodes, request.step_seconds)
        sys.stdout.write(fill_template(kind, job))
        return 0
    from moecc.launch.supervisor import Supervisor
    from moecc.support.process import signals_raised

    words = _program(request.command)
    # Processes of one machine cannot share its accelerators, but can share its cores.
    platforms = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    supervisor = Supervisor(
        words, request.processes, stuck_seconds=request.step_seconds, environment=platforms
    )
    with signals_raised():  # the processes must not outlive this one
        ended = supervisor.run()
    return ended.exit_code


def _checked(command: list[str]) -> list[str]:
    """Return `command` if it is a command of moecc.

    Raises:
      UsageError: it is not.
    """
    from moecc.cli.main import COMMANDS
    from moecc.errors import UsageError, nearest

    known = [c for c in COMMANDS if c != "launch"]
    if not command or command[0] not in known:
        word = command[0] if command else ""
        raise UsageError(
            "the command to run is not a command of moecc",
            expected="for example run, after --",
            found=word or "nothing",
            hint=nearest(word, known),
        )
    return command


def _program(command: list[str]) -> list[str]:
    """Return the command line that each process is started with."""
    if command[0] == "python" and len(command) > 1:
        return [sys.executable, "-m", "moecc.launch.script", *command[1:]]
    return [sys.executable, "-m", "moecc", *_checked(command)]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "launch",
        LaunchRequest,
        launch,
        "Example: moecc launch local -n 2 -- run smollm2-8x --outputs logits.npy",
        progress=Progress.OWN,
    )
