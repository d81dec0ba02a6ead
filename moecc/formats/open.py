"""Open a checkpoint of any format, or the text model in it: the only module that knows all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from moecc.errors import CLOSE, InputError, nearest, printable
from moecc.families.config import FAMILY
from moecc.families.registry import parse_config
from moecc.families.wrappers import (
    TEXT,
    TIE,
    WRAPPERS,
    Wrapper,
    file_name,
    put_back,
    text_config,
    text_names,
    wrapper_of,
)
from moecc.formats.files import os_problem, sniff_file
from moecc.formats.folder import CONFIG_NAME, open_folder
from moecc.formats.gguf.storage import FILE_NAME
from moecc.formats.source import Checkpoint, DerivedCheckpoint, TensorInfo
from moecc.formats.store import is_address, mirror
from moecc.presets import preset_names
from moecc.support.text import amount, with_article
from moecc.support.untyped import JsonDict
from moecc.types import Array, Axis, TensorType
from moecc.weights.expr import Expr, Source

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_model_id(source: str) -> bool:
    """Whether `source` may be the id of a model of the hub."""
    return _MODEL.fullmatch(source) is not None


def cached(source: str) -> Path | None:
    """Return the folder of the model ``ORG/NAME`` in the cache of the hub, or None.

    Nothing is fetched; without huggingface_hub there is no cache.
    """
    if not is_model_id(source):
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, local_files_only=True))
    except ImportError:
        return None
    except Exception:  # what it raises for a model that is not there differs between versions
        return None


def open_checkpoint(path: str | os.PathLike[str], *, needs_config: bool = True) -> Checkpoint:
    """Open a folder of safetensors, a ``.gguf`` file or a JAX checkpoint, local or in a store.

    Headers and configs are checked; no weight is read.  Quantised matrices are dequantised later.

    Args:
      path: the folder or file, or its address: ``s3://BUCKET/FOLDER``, ``hf://ORG/NAME``.
      needs_config: whether a folder without ``config.json`` is an error.

    Raises:
      InputError: not a checkpoint, or an invalid one; all problems at once.
      MachineError: the system or a store denies access.
    """
    source = mirror(str(path), find_more=_tree_folders) if is_address(str(path)) else Path(path)
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
    if tree := _tree_in(source):
        from moecc.formats.trees import open_tree

        return open_tree(source, tree, needs_config=needs_config)
    folder = open_folder(source, needs_config=needs_config)
    try:
        wrapper = wrapper_of(folder.config, by_family=needs_config)
        checkpoint: Checkpoint = folder
        # Both are rare, as GGUF is.
        if folder.config.get("quantization_config") is not None:
            from moecc.formats.quantised import open_quantised

            checkpoint = open_quantised(folder)
        if wrapper is not None and (needs_config or text_names(folder.tensors)):
            checkpoint = WrappedText(checkpoint, wrapper, by_family=needs_config)
        return checkpoint
    except BaseException:
        folder.close()
        raise


def _tree_folders(files: Collection[str], folders: Collection[str]) -> Collection[str]:
    """Return the subfolders of a folder of a store that may have a tree of arrays in them."""
    if any(name.endswith((".safetensors", ".gguf")) for name in files):
        return ()
    from moecc.formats.arrays import tree_folders

    return tree_folders(files, folders)


def _tree_in(source: Path) -> Path | None:
    """Return the folder of a tree of arrays in `source`, a checkpoint of Orbax or T5X."""
    try:
        names = os.listdir(source)
    except OSError as error:
        raise os_problem(error, source) from None
    if any(name.endswith((".safetensors", ".gguf")) for name in names):
        return None
    from moecc.formats.arrays import find_tree

    return find_tree(source)


def _open_file(source: Path) -> Checkpoint:
    kind = sniff_file(source)
    if kind is not None and kind.name == "GGUF":
        # GGUF models are rare, and its reader is half of this package.
        from moecc.formats.gguf.reader import open_gguf

        return open_gguf(source)
    if source.suffix == ".gguf":
        content = kind.text if kind else "a file that does not begin with the letters GGUF"
        raise InputError("this is not a GGUF file", where=source, found=content)
    if kind is None and source.suffix in (".safetensors", ".json"):
        raise InputError(
            "a checkpoint is a folder, not one file of it",
            where=source,
            expected="the folder with config.json and the weights",
            hint=f"give {str(source.parent)!r} instead",
        )
    raise InputError(
        "this is not a checkpoint",
        where=source,
        expected="a folder with config.json and *.safetensors, or a .gguf file",
        found=kind.text if kind else "a file of a kind that moecc does not know",
        hint=kind.hint if kind else None,
    )


def missing_place(source: Path) -> InputError:
    """Return the error that nothing is at `source`, with the nearest name there."""
    if os.path.lexists(source):
        return InputError("this is a symbolic link to nothing", where=source)
    parent = source.parent
    if parent.is_dir():
        neighbours = sorted(os.listdir(parent))[:10_000]
        hint = nearest(source.name, neighbours)
        # A bare name, whose suffix is that of no file: Qwen2.5-7B.
        if hint is None and is_model_id(f"ORG/{source}") and not source.suffix[1:].isalpha():
            hint = f"a model of the hub is hf://ORG/{source}"
            preset = get_close_matches(source.name.lower(), preset_names(), n=1, cutoff=CLOSE)
            hint += f", a config without weights preset:{preset[0]}" if preset else ""
        return InputError("there is no such file or folder", where=source, hint=hint)
    name = source.as_posix()
    return InputError(
        "there is no such file or folder",
        where=source,
        hint=f"hf://{name} is the model of that name on the hub"
        if is_model_id(name)
        else f"the folder {str(parent)!r} does not exist either",
    )


# The text model of a folder that holds one beside encoders of images or sound.


class WrappedText(DerivedCheckpoint):
    """A text model, under the names and with the config of its family.

    Attributes:
      wrapper: the model that holds it.
      others: the other tensors of the file, by their names there.
    """

    def __init__(self, base: Checkpoint, wrapper: Wrapper, *, by_family: bool = True) -> None:
        super().__init__(base)
        self.wrapper, self.format = wrapper, base.format
        self._names = text_names(base.tensors)
        if not self._names:
            raise InputError(
                "the tensors of the text model are not where a wrapper has them",
                where=str(base.path),
                expected="language_model.model.embed_tokens.weight, or as transformers 5 names it",
                found="no such tensor",
            )
        tensors = base.tensors
        names_in_file = frozenset(self._names.values())
        # A graph of the user's own reads tensors under their names in the file, too.
        named = {} if by_family else dict(tensors)
        self.tensors = MappingProxyType(named | {n: tensors[f] for n, f in self._names.items()})
        self.others: dict[str, TensorInfo] = {
            name: info for name, info in tensors.items() if name not in names_in_file
        }
        self.config = text_config(wrapper, base.config, is_tied="lm_head.weight" not in self._names)
        # Versions of transformers read the one or the other; which of them holds, files say.
        parts = (base.config, base.config.get(TEXT))
        self.states_tie = any(isinstance(p, Mapping) and p.get(TIE) is True for p in parts)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor, or of one of the others."""
        return self.base.read(self._names.get(name, name), start, stop)

    def remarks(self) -> list[str]:
        """Return the remarks of the base, and what it is the text model of."""
        parts = sorted({name.partition(".")[0] for name in self.others})
        beside = f"with {amount(len(self.others), 'tensor')} beside it: {', '.join(parts)}"
        of = f"the text model of {with_article(self.base.config['model_type'])}"
        return [*self.base.remarks(), ", ".join([of, *([beside] if parts else [])])]

    def holder_of(self, family: str) -> Wrapper | None:
        """Return the wrapper if it can hold a text model of a family, else None."""
        if twin := self.wrapper.twins.get(family):
            return WRAPPERS[twin]
        stays = family == self.config["model_type"]
        return self.wrapper if stays or (self.wrapper.holds_any and family != FAMILY) else None

    def stored_name(self, name: str) -> str:
        """Return the name in the wrapper's file of a tensor of the text model."""
        return self._names.get(name) or file_name(name, self._names)

    def other_tensors(self) -> list[tuple[str, Expr]]:
        """Return the other tensors by name, each read as it is stored."""
        return [(name, Source(name, _type_of(info))) for name, info in self.others.items()]

    def config_with(self, text: JsonDict) -> JsonDict:
        """Return the wrapper's config.json with the config of a converted text model."""
        before = parse_config(self.config, str(self.path)).to_json()
        return put_back(self.base.config, text, before)


def wrapped_in(checkpoint: Checkpoint | None) -> WrappedText | None:
    """Return the wrapped text model that a checkpoint reads, adapters and branches beneath it."""
    while isinstance(checkpoint, DerivedCheckpoint) and not isinstance(checkpoint, WrappedText):
        checkpoint = checkpoint.base
    return checkpoint if isinstance(checkpoint, WrappedText) else None


def _type_of(info: TensorInfo) -> TensorType:
    axes = tuple(Axis(f"axis_{number}", size) for number, size in enumerate(info.shape))
    return TensorType(info.dtype, axes)
