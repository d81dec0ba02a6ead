"""Open a checkpoint of any format: the only module that knows all formats."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moecc.checkpoint.files import os_problem
from moecc.checkpoint.folder import CONFIG_NAME, open_folder
from moecc.checkpoint.gguf.storage import FILE_NAME
from moecc.checkpoint.hub import PREFIX, cached, fetch, is_model_id
from moecc.checkpoint.sniff import sniff_file
from moecc.checkpoint.source import Checkpoint
from moecc.errors import InputError, nearest, printable


def open_checkpoint(path: str | os.PathLike[str], *, needs_config: bool = True) -> Checkpoint:
    """Open a folder of safetensors, a ``.gguf`` file, a JAX checkpoint, or a model of the hub.

    Headers and configs are checked; no weight is read.  Quantised matrices are dequantised later.

    Args:
      path: the folder or file, or ``hf:ORG/NAME``.
      needs_config: whether a folder without ``config.json`` is an error.

    Raises:
      InputError: not a checkpoint, or an invalid one; all problems at once.
      MachineError: the system denies access.
    """
    if str(path).startswith(PREFIX):
        return _open_folder(fetch(str(path)), needs_config)
    source = Path(path)
    try:
        mode = os.stat(source).st_mode
    except FileNotFoundError:
        if folder := cached(str(path)):
            return _open_folder(folder, needs_config)
        raise missing_place(source) from None
    except OSError as error:
        raise os_problem(error, source) from None
    except ValueError:
        raise InputError("the path is not usable", where=printable(str(source))) from None
    if stat.S_ISDIR(mode):
        file = source / FILE_NAME
        # A folder that moecc filled with a GGUF file has no config.json.
        if file.is_file() and not (source / CONFIG_NAME).exists():
            return _open_file(file)
        return _open_folder(source, needs_config)
    return _open_file(source)


def _open_folder(source: Path, needs_config: bool) -> Checkpoint:
    if place := _tree_in(source):
        from moecc.checkpoint.trees.checkpoint import open_tree

        return open_tree(source, place, needs_config=needs_config)
    folder = open_folder(source, needs_config=needs_config)
    if folder.config.get("quantization_config") is None:
        return folder
    # Rare, as GGUF is.
    from moecc.checkpoint.quantised.folder import open_quantised

    try:
        return open_quantised(folder)
    except BaseException:
        folder.close()
        raise


def _tree_in(source: Path) -> Path | None:
    """Return the folder of a tree of arrays in `source`, a checkpoint of Orbax or T5X."""
    try:
        names = os.listdir(source)
    except OSError as error:
        raise os_problem(error, source) from None
    if any(name.endswith((".safetensors", ".gguf")) for name in names):
        return None
    from moecc.checkpoint.trees.find import find_tree

    return find_tree(source)


def _open_file(source: Path) -> Checkpoint:
    kind = sniff_file(source)
    if kind is not None and kind.name == "GGUF":
        # GGUF models are rare, and its reader is half of this package.
        from moecc.checkpoint.gguf.reader import open_gguf

        return open_gguf(source)
    if source.suffix == ".gguf":
        found = kind.text if kind else "a file that does not begin with the letters GGUF"
        raise InputError("this is not a GGUF file", where=str(source), found=found)
    if kind is None and source.suffix in (".safetensors", ".json"):
        raise InputError(
            "a checkpoint is a folder, not one file of it",
            where=str(source),
            expected="the folder with config.json and the weights",
            hint=f"give {str(source.parent)!r} instead",
        )
    raise InputError(
        "this is not a checkpoint",
        where=str(source),
        expected="a folder with config.json and *.safetensors, or a .gguf file",
        found=kind.text if kind else "a file of a kind that moecc does not know",
        hint=kind.hint if kind else None,
    )


def missing_place(source: Path) -> InputError:
    """Return the error that nothing is at `source`, with the nearest name there."""
    if os.path.lexists(source):
        return InputError("this is a symbolic link to nothing", where=str(source))
    parent = source.parent
    if parent.is_dir():
        neighbours = sorted(os.listdir(parent))[:10_000]
        hint = nearest(source.name, neighbours)
        return InputError("there is no such file or folder", where=str(source), hint=hint)
    name = source.as_posix()
    return InputError(
        "there is no such file or folder",
        where=str(source),
        hint=f"{PREFIX}{name} fetches the model of that name from the hub"
        if is_model_id(name)
        else f"the folder {str(parent)!r} does not exist either",
    )
