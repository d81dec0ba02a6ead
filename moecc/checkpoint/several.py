"""A checkpoint with others beside it: models of the same architecture, and statistics, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from moecc.checkpoint.adapter import AdaptedCheckpoint
from moecc.checkpoint.source import Checkpoint, TensorInfo
from moecc.support.closing import Closing
from moecc.types.arrays import Array
from moecc.weights.branches import BASE, branch_and_name, name_in


class SeveralCheckpoints(Closing):
    """A base and its branches as one; see `moecc.checkpoint.source.Checkpoint`.

    Config and companions are those of the base.  A tensor that a branch stores in another type is
    read in that of the base, rounded to nearest if that is narrower.

    Attributes:
      base: the model that the branches stand beside.
      branches: the others, by name.
      tables: what has tensors of its own, by name: statistics.
    """

    def __init__(
        self,
        base: Checkpoint,
        branches: Mapping[str, Checkpoint],
        tables: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.base = base
        self.branches = dict(branches)
        self.tables = dict(tables or {})
        self.path: Path = base.path
        self.format = base.format
        self.config = base.config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            dict(base.tensors)
            | {
                name_in(branch, name): replace(info, dtype=base.tensors[name].dtype)
                for branch, checkpoint in branches.items()
                for name, info in checkpoint.tensors.items()
                if name in base.tensors
            }
            | {
                name_in(table, name): replace(info, name=name_in(table, name))
                for table, checkpoint in self.tables.items()
                for name, info in checkpoint.tensors.items()
            }
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor. Raises: as its checkpoint."""
        branch, tensor = branch_and_name(name)
        if branch in self.tables:
            return self.tables[branch].read(tensor, start, stop)
        if branch not in self.branches:
            return self.base.read(name, start, stop)
        found = self.branches[branch].read(tensor, start, stop)
        wanted = self.tensors[name].dtype.numpy
        return found if found.dtype == wanted else found.astype(wanted)

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files of the base that an export copies."""
        return self.base.companions()

    def remarks(self) -> list[str]:
        """Return notes for readers of the result, those of the branches with their name."""
        found = [*self.base.remarks(), *self._narrowed()]
        for branch, checkpoint in self.branches.items():
            found += [f"{branch}: {remark}" for remark in checkpoint.remarks()]
        return found

    def _narrowed(self) -> list[str]:
        found = []
        for branch, checkpoint in self.branches.items():
            pairs = {
                (info.dtype.name, self.base.tensors[name].dtype.name)
                for name, info in checkpoint.tensors.items()
                if name in self.base.tensors
                and info.dtype.itemsize_bytes > self.base.tensors[name].dtype.itemsize_bytes
            }
            found += [f"{branch} is stored in {a}, and read in {b}" for a, b in sorted(pairs)]
        return found

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the base's card."""
        return self.base.card()

    def files(self) -> list[Path]:
        """Return the files of all."""
        return [*self.named_files().values()]

    def named_files(self) -> dict[str, Path]:
        """Return the files of all by name, those of a branch below its name."""
        own = {path.name: path for path in self.base.files()}
        others = {
            f"{branch}/{path.name}": path
            for branch, checkpoint in (*self.branches.items(), *self.tables.items())
            for path in checkpoint.files()
        }
        return own | others

    def require_unchanged(self) -> None:
        """Raise InputError if a file of any changed since it was opened."""
        for checkpoint in self._all():
            checkpoint.require_unchanged()

    def close(self) -> None:
        """Close the files of all."""
        for checkpoint in self._all():
            checkpoint.close()

    def _all(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.branches.values(), *self.tables.values())


def files_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files of a checkpoint by name."""
    if isinstance(checkpoint, SeveralCheckpoints):
        return checkpoint.named_files()
    return {path.name: path for path in checkpoint.files()}


def other_bases(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the models that adapters say they are of, if those have other names than the base."""
    branches = checkpoint.branches if isinstance(checkpoint, SeveralCheckpoints) else {}
    adapters = {n: a for n, a in branches.items() if isinstance(a, AdaptedCheckpoint)}
    return {n: of for n, a in adapters.items() if (of := a.other_base()) is not None}


def branches_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the models beside the base."""
    return tuple(checkpoint.branches) if isinstance(checkpoint, SeveralCheckpoints) else ()


def models_of(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """Return all that one consists of, by name; the first is the base."""
    if isinstance(checkpoint, SeveralCheckpoints):
        return {BASE: checkpoint.base, **checkpoint.branches, **checkpoint.tables}
    return {BASE: checkpoint}
