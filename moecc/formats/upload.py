"""Outputs in object stores: claimed by one writer, filled file by file, complete at the end.

A store renames nothing and locks nothing. An object of its own, the claim, says who writes an
output, and makes it unreadable to moecc while files are uploaded; index, config and manifest come
last, and then the claim is removed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from moecc.errors import InputError, MoeccError, UsageError
from moecc.formats.files import os_errors, require_removed
from moecc.formats.folder import CONFIG_NAME
from moecc.formats.manifest import MANIFEST_NAME, file_digest, load
from moecc.formats.output import clean as clean_local
from moecc.formats.output import lock_folder
from moecc.formats.safetensors import INDEX_NAME
from moecc.formats.store import CLAIM_NAME, HUB, UPLOADING, Address, file_system, store_errors
from moecc.support.text import amount

LAST_FILES = (INDEX_NAME, CONFIG_NAME, MANIFEST_NAME)
"""The files without which no program reads a model; they are uploaded last, in this order."""

_CONVERTING = "converting"


def staging_folder(address: Address) -> Path:
    """Return the local folder where an output for a store is written."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "moecc", "uploads", address.scheme, address.path)


def member_stage(stage: Path, process: int | str) -> Path:
    """Return the staging folder of a further process of a run."""
    return stage.with_name(f".{stage.name}.process-{process}")


def upload_digest(folder: Path) -> str:
    """Return the digest of a folder's manifest, which has those of all files."""
    return file_digest(folder / MANIFEST_NAME)


class StoreOutput:
    """A folder in an object store that is written.

    Args:
      address: its address.
      force: whether an existing output is replaced, and the claim of another writer.
      resume: whether what the same writer has begun is continued.

    Raises:
      UsageError: it is no address of a folder in an object store.
      MachineError: a package is missing.
    """

    def __init__(self, address: str, *, force: bool = False, resume: bool = False) -> None:
        self.address = Address.parse(address)
        if self.address.scheme == HUB:
            hint = f"convert to a local folder; then moecc push FOLDER {self.address}"
            raise UsageError("no conversion writes to the hub itself", where=address, hint=hint)
        if "/" not in self.address.path or self.address.name.endswith(".gguf"):
            expected = f"{self.address.scheme}://BUCKET/FOLDER"
            raise UsageError("not a folder in a store", where=address, expected=expected)
        self.stage = staging_folder(self.address)
        self._force, self._resume, self._held = force, resume, ""
        # A claim outlives its process. The next one on this machine knows it by this file, whose
        # lock a process has while it lives.
        self._writer_file = self.stage.with_name(f".{self.stage.name}.writer")
        self._writer, self._is_noted = token_hex(8), False
        self._locks = ExitStack()
        if resume and self._writer_file.is_file() and self._lock_writer():
            self._writer = self._writer_file.read_text().strip()
        self._system: Any = file_system(self.address)

    def close(self) -> None:
        """Let another object, or process, resume what this one left."""
        self._locks.close()

    def check(self, content: str) -> None:
        """Check whether the output may be written with this content; nothing is changed.

        Raises:
          InputError: another writer has claimed it, or it is not empty.
          MachineError: the store denies access, or does not answer.
        """
        claim = self._claimed()
        self._require_free(claim, content)
        names = self._names()
        if names and not claim and not self._force:
            raise InputError(
                "the output folder is not empty",
                where=str(self.address),
                found=f"{len(names):,} files, {min(names)!r} among them",
                hint="give another folder, or --force to replace it",
            )

    def is_staged(self, conversion: str) -> bool:
        """Return whether this conversion is complete in the staging folder, but for its upload.

        Raises:
          MachineError: the store denies access, or does not answer.
        """
        if not (self.stage / MANIFEST_NAME).is_file():
            return False
        states = (
            f"{_CONVERTING} {conversion} ",
            f"{UPLOADING} {upload_digest(self.stage)} {conversion} ",
        )
        return f"{self._claimed()} ".startswith(states)

    def check_stage(self) -> None:
        """Check that no converted model waits in the staging folder. Raises InputError."""
        if (self.stage / MANIFEST_NAME).is_file() and not self._force:
            raise InputError(
                "a converted model was not uploaded yet",
                where=self.stage,
                hint=f"{self._continuing()} continues the upload, --force begins again",
            )

    @contextmanager
    def claimed(self, content: str) -> Iterator[None]:
        """Hold the claim while the output is converted; give it up on any failure.

        Args:
          content: a digest of what decides the bytes of the output.

        Raises: as `check`.
        """
        self._claim(_CONVERTING, content)
        try:
            yield
        except BaseException:
            with suppress(MoeccError):
                if self._claimed() == self._held:
                    self._release()
            raise

    def put(self, folder: Path, conversion: str = "") -> None:
        """Upload a folder that moecc wrote, its manifest last.

        Args:
          folder: the folder.
          conversion: a digest of what decided its bytes, by which the same conversion resumes.

        Raises:
          InputError: another writer has claimed the output.
          MachineError: the store denies access, or does not answer; the same call continues.
        """
        manifest = load(folder)
        content = upload_digest(folder)
        is_continued = self._claimed().startswith(f"{UPLOADING} {content}")
        self._claim(UPLOADING, f"{content} {conversion}".rstrip())
        listed = {*manifest.weights, *manifest.files, MANIFEST_NAME}
        present = self._names()
        # An old output is unreadable before the first of its files is replaced.
        for name in [*reversed(LAST_FILES), *sorted(present.keys() - set(LAST_FILES))]:
            if name in present and not (is_continued and name in listed):
                self._remove(name)
                del present[name]
        for name in [
            *sorted(listed.difference(LAST_FILES)),
            *(name for name in LAST_FILES if name in listed),
        ]:
            if present.get(name) != (folder / name).stat().st_size:
                self._put_file(folder / name, name)
        self._release()

    def put_stage(self, conversion: str = "") -> None:
        """Upload the staged output and remove it. Raises as `put`, naming how to continue."""
        try:
            self.put(self.stage, conversion)
        except MoeccError as error:
            if isinstance(error, InputError):
                raise
            (problem,) = error.problems
            raise type(error)(
                problem.message, where=problem.where, found=problem.found,
                hint=f"the converted model is complete: {self._continuing()}",
            ) from None  # fmt: skip
        require_removed(self.stage, "the upload is complete, but its staging folder remains")

    def clean(self) -> list[str]:
        """Remove what an interrupted writer left, here and in the store; return what was done.

        Files are removed where an upload had begun, because they are no complete output.
        """
        actions = clean_local(self.stage) if self.stage.parent.is_dir() else []
        members = self.stage.parent.glob(member_stage(self.stage, "*").name)
        for stage in (self.stage, *members):
            if stage.is_dir():
                require_removed(stage, "this could not be deleted")
                actions.append(f"{stage}: removed what was not uploaded")
        if claim := self._claimed():
            names = sorted(self._names()) if claim.startswith(UPLOADING) else []
            for name in names:
                self._remove(name)
            self._release()
            actions.append(f"{self.address}: removed a claim and {amount(len(names), 'file')}")
        return actions

    def _file(self, name: str) -> Address:
        return Address(self.address.scheme, f"{self.address.path}/{name}")

    def _names(self) -> dict[str, int]:
        """Return the sizes of the files in the folder, the claim excepted."""
        path = self.address.in_store
        with store_errors(self.address, "list"):
            self._system.invalidate_cache()
            entries = self._system.find(path, detail=True)
        sizes = {name.removeprefix(f"{path}/"): int(e["size"]) for name, e in entries.items()}
        return {name: size for name, size in sizes.items() if name not in (CLAIM_NAME, path)}

    def _claimed(self) -> str:
        """Return the text of the claim, empty if there is none."""
        self._system.invalidate_cache()
        text = self._read(CLAIM_NAME, absent=b"")
        return text.decode("utf-8", "replace").strip()

    def _read(self, name: str, absent: bytes | None = None) -> bytes:
        """Return a whole file, or `absent` in place of one that is not there."""
        file = self._file(name)
        with store_errors(file):
            try:
                data: bytes = self._system.cat_file(file.in_store)
            except FileNotFoundError:
                if absent is None:
                    raise
                return absent
        return data

    def _put_file(self, path: Path, name: str) -> None:
        """Upload a file, unless another writer took the output over."""
        target = self._file(name)
        self._require_held()
        with store_errors(target, "write"):
            self._system.put_file(str(path), target.in_store)

    def _claim(self, state: str, content: str) -> None:
        """Make the claim, or replace one that is held or may be taken over."""
        claim = f"{state} {content} {self._writer}"
        path, data = self._file(CLAIM_NAME).in_store, f"{claim}\n".encode()
        current = self._claimed()  # first, because some servers ignore the condition of `create`
        with store_errors(self.address, "write"):
            try:
                if not current:
                    self._note_writer()
                    self._system.pipe_file(path, data, mode="create")
            except OSError:  # each library has another error for an object that exists
                current = self._claimed()
                if not current:
                    raise
            # A retry finds the claim of the attempt whose answer was lost.
            if current and current not in (self._held, claim):
                self._require_free(current, content)
            if current:
                self._note_writer()
                self._system.pipe_file(path, data)
        self._held = claim
        self._require_held()

    def _require_free(self, claim: str, content: str) -> None:
        """Raise InputError if a claim, if there is one, may not be taken for some content."""
        is_own = f" {content} " in claim or claim.endswith(f" {self._writer}")
        if not claim or self._force or (self._resume and is_own):
            return
        hint = "wait for it; --resume continues the same one, --force takes its place"
        if claim.startswith(UPLOADING) and self.stage.is_dir():
            hint = f"{self._continuing()} continues the upload, --force begins again"
        raise InputError(
            "another conversion is writing this output, or was interrupted",
            where=str(self.address),
            found=f"its claim, {CLAIM_NAME}: {claim}",
            hint=hint,
        )

    def _require_held(self) -> None:
        if (claim := self._claimed()) != self._held:
            raise InputError(
                "another writer took this output over",
                where=str(self.address),
                found=f"its claim, {CLAIM_NAME}: {claim or 'none'}",
                hint=self._lost_hint(),
            )

    def _lost_hint(self) -> str:
        return "let it finish, or begin again with --force"

    def _continuing(self) -> str:
        return f"moecc push {shlex.quote(str(self.stage))} {self.address} --resume"

    def _note_writer(self) -> None:
        if not self._is_noted:
            self._lock_writer()
            with os_errors(self._writer_file, "write"):
                self._writer_file.write_text(f"{self._writer}\n")
            self._is_noted = True

    def _lock_writer(self) -> bool:
        """Lock the file of the writer until `close`; return whether no other has it."""
        with os_errors(self._writer_file, "write"):
            self._writer_file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._writer_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._locks.callback(os.close, descriptor)
        return lock_folder(descriptor)

    def _release(self) -> None:
        """Remove the claim."""
        self._remove(CLAIM_NAME)
        self._writer_file.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        with store_errors(self._file(name), "remove"):
            self._system.rm_file(self._file(name).in_store)
