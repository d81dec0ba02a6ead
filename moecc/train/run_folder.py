"""Write a run folder: made as a whole, then grown by steps that are complete or absent."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moecc.checkpoint.durable import synchronise_folder, write_durable
from moecc.checkpoint.files import os_problem, read_whole
from moecc.checkpoint.manifest import seal
from moecc.checkpoint.outdir import output_folder
from moecc.checkpoint.removal import remove
from moecc.checkpoint.run.digests import digests, require_state
from moecc.checkpoint.run.layout import (
    GRAPH,
    LINEAGE,
    METRICS,
    RECIPE,
    SOURCE,
    STATE,
    STEP,
    STEP_SCHEMA,
    STEPS,
    SavedStep,
    best_step,
    saved_steps,
)
from moecc.errors import InputError, MachineError
from moecc.support.untyped import Json

Content = Path | bytes
"""A file, or what is to be in it."""


def create_run(
    out: Path,
    *,
    recipe: str,
    graph: str,
    lineage: Json,
    source: Mapping[str, Content],
    inputs: tuple[Path, ...] = (),
    begun: tuple[SavedStep, str] | None = None,
) -> None:
    """Make the folder of a run; it is there as a whole, or not at all.

    Args:
      out: the folder; it must not exist, or be empty.
      recipe: the recipe, as TOML.
      graph: the canonical graph, as text.
      lineage: what ``lineage.json`` says.
      source: the files of the source that an export copies, by name.
      inputs: what is read, which the output must not touch.
      begun: a step of another run that this one goes on from, and the digest of the recipe.

    Raises:
      InputError: the folder cannot be used.
      MachineError: the disk is full, or there is no right to write.
    """
    with output_folder(out, inputs=inputs) as folder:
        (folder / SOURCE).mkdir()
        (folder / STEPS).mkdir()
        write_durable(folder / RECIPE, recipe.encode())
        write_durable(folder / GRAPH, graph.encode())
        write_durable(folder / LINEAGE, _json(lineage))
        write_durable(folder / METRICS, b"")
        for name, content in source.items():
            place = folder / SOURCE / name
            place.parent.mkdir(exist_ok=True)
            write_durable(place, read_whole(content) if isinstance(content, Path) else content)
        if begun is not None:
            _copy_step(folder, *begun)


def _copy_step(run: Path, step: SavedStep, recipe: str) -> None:
    """Copy a step of another run; what was measured there is not of this run."""
    require_state(step)  # the copy gets digests of its own
    state = begin_step(run, step.number)
    try:
        shutil.copytree(step.state, state)
    except (shutil.Error, OSError) as error:
        raise MachineError(f"the state cannot be copied: {error}", where=str(step.state)) from None
    own = {k: v for k, v in step.facts.items() if k in ("tokens", "left_out", "tensors")}
    finish_step(run, step.number, {**own, "recipe": recipe, "loss": None})


@contextmanager
def locked_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run, which no other process may train meanwhile.

    Raises:
      InputError: another process trains it.
      MachineError: the folder cannot be opened.
    """
    try:
        descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise os_problem(error, run, "open") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(
            "another process trains this run", where=str(run), hint="wait until it has finished"
        ) from None
    finally:
        os.close(descriptor)


def begin_step(run: Path, number: int) -> Path:
    """Return the folder for the arrays of a step; what an earlier attempt left there is removed."""
    folder = run / STEPS / str(number)
    remove(folder)
    try:
        folder.mkdir()
    except OSError as error:
        raise os_problem(error, folder, "make") from None
    return folder / STATE


def finish_step(run: Path, number: int, facts: Json) -> SavedStep:
    """Make a step complete, whose arrays are written; from now on it is one of the run's.

    Args:
      run: the folder.
      number: steps done.
      facts: what ``step.json`` says besides schema, number, and the digests of the state.

    Raises:
      MachineError: the disk is full, or the arrays are gone.
    """
    folder = run / STEPS / str(number)
    if not (folder / STATE).is_dir():
        raise MachineError("the arrays of a checkpoint were removed", where=str(folder))
    described = [run / name for name in (RECIPE, LINEAGE, GRAPH)]
    content = {
        "schema": STEP_SCHEMA, "step": number, **facts,
        "files": digests(folder / STATE, _files_in(folder / STATE)),
        "run_files": digests(run, [*described, *_files_in(run / SOURCE)]),
    }  # fmt: skip
    _write_atomically(folder / STEP, seal(_json(content).removesuffix(b"\n}\n")))
    synchronise_folder(folder.parent)
    return SavedStep(number, folder)


def keep_steps(run: Path, count: int) -> None:
    """Remove the steps of a run but the last `count` and the best."""
    steps = saved_steps(run)
    kept = {s.number for s in steps[-max(count, 1) :]}
    best = best_step(steps)
    for step in steps:
        if step.number not in kept and step != best:
            # A folder without its step.json is no step, whatever else is still in it.
            (step.folder / STEP).unlink(missing_ok=True)
            remove(step.folder)


def remove_incomplete(run: Path) -> None:
    """Remove what a killed save left, and steps that are being removed."""
    complete = {s.folder for s in saved_steps(run)}
    for folder in (run / STEPS).iterdir():
        if folder not in complete:
            remove(folder)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _json(content: Json) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_durable(partial, content)
    try:
        os.replace(partial, path)
    except OSError as error:
        raise os_problem(error, path, "rename") from None
    synchronise_folder(path.parent)
