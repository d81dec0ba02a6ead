"""Cluster scripts that start moecc: printed, for people to read and change, never run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from moecc.errors import UsageError, nearest

TEMPLATES = ("slurm", "xpk")

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?\Z")


@dataclass(frozen=True)
class Job:
    """The parameters of a template.

    Attributes:
      command: arguments of moecc, ``run`` first.
      name: the name of the job: a DNS label, as Kubernetes requires.
      nodes: the number of machines, or slices of TPUs.
      stuck_seconds: how long a process may report no step.
    """

    command: Sequence[str]
    name: str = "moecc"
    nodes: int = 1
    stuck_seconds: int = 300


def fill_template(kind: str, job: Job) -> str:
    """Return the script of a cluster.

    Args:
      kind: one of `TEMPLATES`.
      job: what to run.

    Raises:
      UsageError: there is no such template, or the name is not a DNS label.
    """
    if kind not in TEMPLATES:
        hint = nearest(kind, TEMPLATES) or f"templates: {', '.join(TEMPLATES)}"
        raise UsageError(f"unknown template {kind!r}", hint=hint)
    if _LABEL.match(job.name) is None:
        raise UsageError(
            "not a valid name of a job",
            expected="a DNS label of at most 40: small letters, digits and dashes",
            found=job.name,
        )
    text = (files(__package__) / "scripts" / f"{kind}.sh").read_text("utf-8")
    command = shlex.join(["moecc", *job.command])
    return Template(text).substitute(
        name=job.name,
        nodes=job.nodes,
        seconds=job.stuck_seconds,
        command=command,
        quoted=shlex.quote(
            f"MOECC_DISTRIBUTED=cluster MOECC_STEP_SECONDS={job.stuck_seconds} {command}"
        ),
    )
