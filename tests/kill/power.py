"""A disk that forgets at a kill what was not synchronised: as after a loss of power."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .disks import KillingDisk


@dataclass
class Name:
    """A name that was made, moved or removed in a folder that was not synchronised since."""

    parent: int
    undo: Callable[[], None]


@dataclass
class Memory:
    """What is not on the disk yet.

    A journaling file system keeps the order of names: what is lost of them is the last part.  The
    contents of files come in any order, or as zeros.

    Attributes:
      root: the folder in which everything happens.
      names: changed names, oldest first.
      contents: what files had when they were last synchronised, by inode.
    """

    root: Path
    names: list[Name] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)

    def find(self, inode: int) -> Path | None:
        """Return where an inode is now."""
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = Path(folder) / name
                if path.lstat().st_ino == inode:
                    return path
        return None

    def named(self, path: Path, undo: Callable[[Path], None]):
        """Note a name that was made, or moved here."""
        inode = path.lstat().st_ino

        def act():
            now = self.find(inode)
            if now is not None:
                undo(now)

        self.names.append(Name(path.parent.stat().st_ino, act))

    def changed(self, descriptor: int):
        """Note that a file is about to change."""
        inode = os.fstat(descriptor).st_ino
        if inode not in self.contents:
            size = os.fstat(descriptor).st_size
            path = self.find(inode)
            self.contents[inode] = path.read_bytes() if size else b""

    def synced(self, descriptor: int):
        """Forget what is on the disk now."""
        inode = os.fstat(descriptor).st_ino
        self.contents.pop(inode, None)
        self.names = [name for name in self.names if name.parent != inode]

    def lose(self, how: str, seed: int):
        """Lose ``all`` of it, the ``data`` alone, or ``some``, drawn by a seed."""
        draw = random.Random(seed)
        kept = {"all": 0, "data": len(self.names)}.get(how, draw.randint(0, len(self.names)))
        for name in reversed(self.names[kept:]):
            name.undo()
        for inode, before in self.contents.items():
            path = self.find(inode)
            if path is None:
                continue
            size = path.stat().st_size
            choices = {"all": [before], "data": [bytes(size)]}
            path.write_bytes(
                draw.choice(choices.get(how, [before, bytes(size), path.read_bytes()]))
            )


class ForgettingDisk(KillingDisk):
    """Kills the process at a call, after losing what was not synchronised."""

    def __init__(self, root: Path, trash: Path, how: str, at: int | None):
        super().__init__(at)
        self.memory = Memory(root)
        self.trash = trash
        self.how = how

    def die(self):
        self.memory.lose(self.how, self.at or 0)
        super().die()

    def open(self, path: Path, flags: int) -> int:
        with self._lock:
            is_new = not os.path.lexists(path)
            made = super().open(path, flags)
            if is_new:
                self.memory.named(path, lambda now: now.unlink())
            return made

    def truncate(self, descriptor: int, size_bytes: int):
        with self._lock:
            self.memory.changed(descriptor)
            super().truncate(descriptor, size_bytes)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        with self._lock:
            self.memory.changed(descriptor)
            return super().write(descriptor, data, offset)

    def append(self, descriptor: int, data: bytes):
        with self._lock:
            self.memory.changed(descriptor)
            super().append(descriptor, data)

    def sync(self, descriptor: int):
        with self._lock:
            super().sync(descriptor)
            self.memory.synced(descriptor)

    def rename(self, source: Path, target: Path):
        with self._lock, self.call():
            self._move(source, target)

    def replace(self, source: Path, target: Path):
        with self._lock, self.call():
            kept = self._spare()
            if target.exists():
                os.link(target, kept)
            os.replace(source, target)

            def undo(now):
                os.rename(now, source)
                if kept.exists():
                    os.rename(kept, target)

            self.memory.named(target, undo)

    def mkdir(self, path: Path, mode: int = 0o777):
        with self._lock:
            super().mkdir(path, mode)
            self.memory.named(path, shutil.rmtree)

    def unlink(self, path: Path):
        with self._lock, self.call():
            self._discard(path)

    def remove_tree(self, path: Path):
        with self._lock, self.call():
            for child in sorted(path.iterdir()):
                self._discard(child)
            self._discard(path)

    def _move(self, source: Path, target: Path):
        if target.is_dir():
            target.rmdir()
        os.rename(source, target)
        self.memory.named(target, lambda now: os.rename(now, source))

    def _discard(self, path: Path):
        """Remove something so that it can come back."""
        kept = self._spare()
        parent = path.parent.stat().st_ino
        os.rename(path, kept)

        def undo():
            if path.parent.is_dir() and not path.exists():
                os.rename(kept, path)

        self.memory.names.append(Name(parent, undo))

    def _spare(self) -> Path:
        return self.trash / str(len(list(self.trash.iterdir())))
