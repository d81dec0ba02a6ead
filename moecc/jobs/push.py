"""``moecc push``: upload a converted folder to the hub or to an object store."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moecc.errors import InputError, UsageError
from moecc.jobs.command import Force, Report, Spelling
from moecc.support.text import amount

if TYPE_CHECKING:
    from moecc.formats.manifest import Manifest
    from moecc.formats.store import Address


def push(
    folder: Annotated[str, Spelling(complete="models")],
    address: str,
    *,
    private: bool = False,
    allow_edited_card: bool = False,
    resume: bool = False,
    force: Force = False,
) -> Report:
    """Upload a converted folder, with card and receipt, after verifying it.

    Every file is compared with the manifest first. The hub gets one commit, whose card loads the
    model by the repository's name; in an object store the manifest comes last, and until then the
    folder is marked as incomplete.

    Args:
      folder: Folder that moecc convert wrote.
      address: hf://ORG/NAME, hf://ORG/NAME@BRANCH, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.
      private: Make a new repository of the hub private.
      allow_edited_card: Accept a model card that was edited after the conversion, and state it in
        the manifest, which then is that of the folder as it is uploaded.
      resume: Continue an upload of the same folder to an object store that was interrupted.
      force: Replace what is there.

    Example:
      moecc push smollm2-8x hf://ORG/smollm2-8x --private
    """
    from moecc.formats.manifest import MANIFEST_NAME, load, record_card
    from moecc.formats.run import split_reference
    from moecc.formats.store import HUB, Address, is_address
    from moecc.formats.upload import StoreOutput, upload_digest
    from moecc.jobs.verify import verify_files

    if not is_address(address):
        expected = "hf://ORG/NAME, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        raise UsageError("not an address in a store", expected=expected, found=address)
    target, path = Address.parse(address), Path(folder)
    with ExitStack() as opened:
        output = None
        if target.scheme != HUB:
            output = opened.enter_context(closing(StoreOutput(address, force=force, resume=resume)))
        if path.is_file():
            hint = "moecc convert SOURCE FOLDER --to gguf:ARCH writes a folder with model.gguf"
            raise InputError("a folder is pushed, not a file", where=folder, hint=hint)
        if split_reference(folder) is not None:
            hint = f"moecc convert {folder} FOLDER -p '' --to auto writes a folder to push"
            raise InputError("a run is no converted folder", where=folder, hint=hint)
        verify_files(folder, allow_edited_card, None, False)
        if allow_edited_card:
            record_card(path)
        manifest = load(path)
        names = [*manifest.weights, *manifest.files, MANIFEST_NAME]
        commit = None
        if output is None:
            commit = _commit(path, target, manifest, names, private=private, force=force)
        else:
            output.check(upload_digest(path))
            if path == output.stage:  # what an interrupted conversion left is removed then
                output.put_stage()
            else:
                output.put(path)
    data = {"folder": folder, "address": str(target), "files": len(names), "commit": commit}
    text = f"{amount(len(names), 'file')} of {folder} uploaded to {target}"
    return Report("push", data, lambda: text)


def _commit(
    folder: Path, target: Address, manifest: Manifest, names: list[str],
    *, private: bool, force: bool,
) -> str:  # fmt: skip
    """Upload files to a branch of a model of the hub in one commit, and return it."""
    from moecc.formats.manifest import MANIFEST_NAME, dump, with_card
    from moecc.formats.modelcard import CARD_NAME, published_card
    from moecc.formats.store import require_package, store_errors

    require_package(target)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub, branch = HfApi(), target.revision or None
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    if branch is None and CARD_NAME in files:  # the name alone is that of the main branch
        card = published_card((folder / CARD_NAME).read_bytes(), target.path)
        files |= {CARD_NAME: card, MANIFEST_NAME: dump(with_card(manifest, card))}
    with store_errors(target, "write"):
        hub.create_repo(target.path, private=private or None, exist_ok=True)
        if branch is not None:
            hub.create_branch(target.path, branch=branch, exist_ok=True)
        state = hub.model_info(target.path, revision=branch)
        present = {file.rfilename for file in state.siblings or ()} - {".gitattributes"}
        if present and not force:
            raise InputError(
                "the repository is not empty",
                where=str(target),
                found=f"{len(present):,} files, {min(present)!r} among them",
                hint="give another branch, hf://ORG/NAME@BRANCH; --force replaces all, card too",
            )
        commit = hub.create_commit(
            target.path,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in sorted(present.difference(names))),
            ],
            commit_message="Upload a model converted by moecc", revision=branch,
            parent_commit=state.sha,
        )  # fmt: skip
    return str(commit.oid)
