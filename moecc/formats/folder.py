"""Open a Hugging Face folder: config.json, one safetensors file or shards with an index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from moecc.errors import InputError, Problems, printable, quoted
from moecc.formats.files import (
    PICKLE,
    ZIP,
    DescriptorPool,
    Identity,
    check_file,
    identify,
    is_recordable,
    json_content,
    os_errors,
    read_bounded,
    read_json_object,
    read_whole,
    require_unchanged,
    sniff_file,
)
from moecc.formats.safetensors import (
    ADAPTER_CONFIG,
    INDEX_NAME,
    SINGLE_NAME,
    Header,
    choose_weights,
    compare_with_headers,
    read_header,
)
from moecc.formats.source import FIRST, SECOND, Checkpoint, SavedMoments, TensorInfo, tensor_info
from moecc.support.documents import parse_json
from moecc.support.untyped import Json, JsonDict
from moecc.types import Array, TensorType

# Companion files, besides the weights, that an export copies byte for byte.
#
# Tokenizers are copied, never saved again; the settings of one that transformers 5 saved are
# written so that version 4 loads it, too.  Code and pickles are never copied, and the model card is
# written anew.

SETTINGS = "tokenizer_config.json"
"""The class, the special tokens and the inputs of a tokenizer of transformers."""

TOKENIZERS = (
    "tokenizer.json",
    SETTINGS,
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)
"""Files of which one or more make a tokenizer of transformers."""

_COPIED = (
    *TOKENIZERS,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
TEMPLATES = "additional_chat_templates"
_CODE = {".py", ".pyc", ".so"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_ARRAYS = {".h5", ".keras", ".msgpack", ".nemo"}


def find_companions(folder: Path, problems: Problems) -> dict[str, Path]:
    """Return the files to copy by their path in `folder`; unusable ones go to `problems`."""
    names = [name for name in os.listdir(folder) if is_companion(name)]
    templates = folder / TEMPLATES
    if templates.is_dir():
        template_names = (name for name in os.listdir(templates) if name.endswith(".jinja"))
        names += [f"{TEMPLATES}/{name}" for name in template_names]
    companions = {}
    for name in sorted(names):
        path = folder / name
        if path.is_dir():
            continue
        if not is_recordable(name):
            problems.add(
                f"an export would copy {quoted(name)}, whose name no manifest allows",
                where=folder,
                hint="rename it, or move it out of the folder",
            )
            continue
        if _is_usable(path, folder, problems):
            companions[name] = path
    return companions


def companion_content(name: str, content: Path | bytes) -> bytes:
    """Return what an export has of a companion file. Raises InputError, MachineError.

    The same bytes, but for the settings of a tokenizer that transformers 5 saved: version 4 (4.57)
    has no class ``TokenizersBackend``, and fails at a list of ``extra_special_tokens``.
    """
    data = read_whole(content) if isinstance(content, Path) else content
    settings = dict(_json(data, MAX_TOKENIZER_BYTES)) if name == SETTINGS else {}
    changed = {}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # Version 4 adds token types otherwise, which decoders reject.
        names = settings.get("model_input_names", ["input_ids", "attention_mask"])
        changed = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}
    if isinstance(settings.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return json_content(settings | changed) if changed else data


def is_companion(name: str) -> bool:
    """Return whether a file of this name is copied into an export."""
    if Path(name).suffix.lower() in _CODE | _PICKLES | _ARRAYS:
        return False
    return any(fnmatchcase(name, pattern) for pattern in _COPIED)


def _is_usable(path: Path, folder: Path, problems: Problems) -> bool:
    with problems:
        check_file(path, folder)
        kind = sniff_file(path)
        if kind not in (PICKLE, ZIP):
            return True
        problems.add(
            "a file that an export would copy does not have the type of its name",
            where=path,
            found=kind.text,
            hint="remove it from the folder",
        )
    return False


CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 << 20
NAMED_WEIGHTS = "transformers_weights"
"""The key of a config that names the file of the weights, or their index."""


OPTIMIZER_NAME = "optimizer.safetensors"
_ADAM = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
"""Kinds of moments by the names that torch.optim gives them."""


class SafetensorsFolder(Checkpoint):
    """A checkpoint in a Hugging Face folder; see `moecc.formats.source.Checkpoint`."""

    format = "safetensors"

    def __init__(
        self,
        path: Path,
        config: JsonDict,
        headers: dict[Path, Header],
        companions: dict[str, Path],
        others: dict[Path, Identity] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.tensors = MappingProxyType(
            {name: info for header in headers.values() for name, info in header.tensors.items()}
        )
        self._identities: dict[Path, Identity] = {
            file: header.identity for file, header in headers.items()
        }
        self._companions = companions
        self._others = others or {}
        self._pool = DescriptorPool()
        self._optimizer: SafetensorsFolder | None = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: no such tensor, its file was truncated, changed or replaced since opening,
            or a boolean is neither 0 nor 1.
          MachineError: the system cannot read it.
          ValueError: rows beyond the tensor.
        """
        info = tensor_info(self.tensors, name, self.path)
        import numpy as np  # headers are read without it

        shape, skipped = rows_of(info, start, stop)
        values = np.empty(shape, info.dtype.numpy)
        raw = values.reshape(-1).view(np.uint8)
        if raw.size:
            identity = self._identities[info.file]
            self._pool.read_into(info.file, identity, raw.data, info.offset + skipped)
        if info.dtype.kind == "bool" and raw.size and raw.max() > 1:
            raise InputError(
                "a boolean tensor has bytes other than 0 and 1",
                where=f"{info.file}, tensor {quoted(name)}",
                found=f"0x{int(raw.max()):02x}",
            )
        return values

    @cached_property
    def moments(self) -> SavedMoments[TensorInfo] | None:
        """The moments of the optimiser, if a program in PyTorch has saved some by name.

        Raises:
          InputError: the file is faulty, or its counts of updates differ.
        """
        file = self.path / OPTIMIZER_NAME
        if not os.path.lexists(file):
            return None
        check_file(file, self.path)
        header = read_header(file)
        state: dict[str, dict[str, TensorInfo]] = {}
        for name, info in header.tensors.items():
            kind, _, tensor = name.partition(".")
            state.setdefault(kind, {})[tensor] = info
        self._optimizer = SafetensorsFolder(self.path, {}, {file: header}, {})
        counts = {int(self._optimizer.read(info.name)) for info in state.get("step", {}).values()}
        of = {kind: state[word] for word, kind in _ADAM.items() if word in state}
        if len(counts) != 1 or len(of) != len(_ADAM):
            raise InputError(
                "the state of the optimiser is not that of Adam, by name", where=file,
                expected="exp_avg.NAME, exp_avg_sq.NAME and step.NAME, with one number of steps",
                found=f"{', '.join(sorted(state)) or 'nothing'}, steps {sorted(counts)}",
            )  # fmt: skip
        return SavedMoments("adamw", counts.pop(), of)

    def moment_type(self, kind: str, name: str, type: TensorType) -> TensorType:
        """Return the type of a moment of a tensor, whose own is `type`.

        Raises:
          InputError: the moment has another shape than the tensor.
        """
        assert self.moments is not None, "there are moments"
        info = self.moments.of[kind][name]
        if info.shape != type.shape:
            raise InputError(
                f"a moment of {quoted(name)} has another shape than the tensor", where=info.file,
                expected=str(type.shape), found=str(info.shape),
            )  # fmt: skip
        return type.with_dtype(info.dtype)

    def read_moment(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a moment of a tensor. Raises as `read`."""
        assert self.moments is not None, "there are moments"
        assert self._optimizer is not None, "it has been opened"
        return self._optimizer.read(self.moments.of[kind][name].name, start, stop)

    def files(self) -> list[Path]:
        """Return the weight files, the index if there is one, and the config."""
        metadata = [self.path / INDEX_NAME, self.path / CONFIG_NAME]
        return [*self._identities, *(path for path in metadata if path.exists())]

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        require_unchanged(self._others | self._identities)

    def close(self) -> None:
        """Close the files."""
        self._pool.close()
        if self._optimizer is not None:
            self._optimizer.close()


def rows_of(info: TensorInfo, start: int, stop: int | None) -> tuple[tuple[int, ...], int]:
    """Return the shape of rows [start, stop) of a tensor, and the number of bytes before them.

    Raises:
      ValueError: rows out of range, or rows of a tensor without axes.
    """
    if not info.shape:
        if start or stop is not None:
            raise ValueError(f"{info.name!r} has no axes, and therefore no rows")
        return (), 0
    rows = info.shape[0]
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start} to {stop} of {info.name!r}, which has {rows}")
    row_bytes = info.nbytes // rows if rows else 0
    return (stop - start, *info.shape[1:]), start * row_bytes


def open_folder(
    path: Path, *, with_weights: bool = True, needs_config: bool = True
) -> SafetensorsFolder:
    """Open a folder; config, index and all headers are checked, but no weight is read.

    Args:
      path: the folder.
      with_weights: whether weights are looked for; without, a config is enough.
      needs_config: whether it is an error if there is no config.

    Raises:
      InputError: with all problems of the folder.
      MachineError: the system denies access.
    """
    problems = Problems()
    with os_errors(path):
        names = set(os.listdir(path))
    # Identified before they are read, so that no change in between goes unnoticed.
    others = _identify_all(path / name for name in (CONFIG_NAME, INDEX_NAME))
    # An adapter has no config, which is not what is wrong with it.
    is_needed = needs_config and ADAPTER_CONFIG not in names
    reads_config = is_needed or os.path.lexists(path / CONFIG_NAME)
    config = _read_config(path, problems) if reads_config else {}
    index, shards = choose_weights(path, names, problems) if with_weights else (None, [])
    read = INDEX_NAME if index is not None else SINGLE_NAME
    if with_weights and config.get(NAMED_WEIGHTS) not in (None, read):
        problems.add(
            "the config names the file of the weights, which transformers loads in place of others",
            where=f"{path / CONFIG_NAME}: {NAMED_WEIGHTS}",
            expected=f"nothing, or {read}",
            found=printable(str(config[NAMED_WEIGHTS]), 60),
            hint=f"call this file {SINGLE_NAME}, and remove the key",
        )
    headers = _read_headers(path, shards, problems)
    if index is not None:
        compare_with_headers(index, headers, problems)
    companions = find_companions(path, problems)
    problems.raise_if_any()
    others |= _identify_all(companions.values())
    return SafetensorsFolder(path, config, headers, companions, others)


def _identify_all(paths: Iterable[Path]) -> dict[Path, Identity]:
    """Identify the files that exist; what is wrong with others is reported when they are read."""
    identities = {}
    for path in paths:
        with suppress(InputError):
            identities[path] = identify(path)
    return identities


def _read_config(path: Path, problems: Problems) -> JsonDict:
    file = path / CONFIG_NAME
    if not os.path.lexists(file):
        hint = "it comes with the weights; moecc needs it to know the architecture"
        problems.add("the folder has no config.json", where=path, hint=hint)
        return {}
    with problems:
        check_file(file, path)
        return read_json_object(file, limit_bytes=MAX_CONFIG_BYTES)
    return {}


def _read_headers(path: Path, shards: list[str], problems: Problems) -> dict[Path, Header]:
    headers = {}
    for name in shards:
        file = path / name
        if not os.path.lexists(file):
            hint = "fetch it again, or fetch the whole model again"
            problems.add(f"the shard {quoted(name)} is missing", where=path, hint=hint)
            continue
        with problems:
            check_file(file, path)
            headers[file] = read_header(file)
    return headers


# Findings about a checkpoint that stop no conversion, and that no reader should have to find.
#
# Token ids that the model has no row for, a tokenizer with more tokens than the embedding has rows,
# and 8-bit weights whose scales are missing all load without complaint elsewhere.

MAX_TOKENIZER_BYTES = 64 << 20
_MAX_SETTINGS_BYTES = 1 << 20
_MAX_VALUES = 1 << 23
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
_EIGHT_BITS = ("f8e4m3fn", "f8e5m2")


def findings(checkpoint: Checkpoint, vocabulary: int | None) -> list[str]:
    """Return a line for each finding.

    Args:
      checkpoint: the opened checkpoint; of its weights only the headers are looked at.
      vocabulary: the rows of the embedding, if they are known.
    """
    if vocabulary is None:
        return list(_unscaled(checkpoint))
    return [
        *_wrong_ids("config.json", checkpoint.config, vocabulary),
        *_companion_findings(checkpoint.companions(), vocabulary),
        *_unscaled(checkpoint),
    ]


def _companion_findings(files: Mapping[str, Path | bytes], vocabulary: int) -> Iterator[str]:
    settings = _json(files.get("generation_config.json"), _MAX_SETTINGS_BYTES)
    yield from _wrong_ids("generation_config.json", settings, vocabulary)
    largest = _largest_token(_json(files.get("tokenizer.json"), MAX_TOKENIZER_BYTES))
    if largest >= vocabulary:
        yield (
            f"tokenizer.json: the token {largest} has no row in the embedding of {vocabulary:,} "
            "rows; a text with it cannot be run"
        )


def _wrong_ids(name: str, settings: Json, vocabulary: int) -> Iterator[str]:
    for key in _IDS:
        stated = settings.get(key)
        for number in stated if isinstance(stated, list) else [stated]:
            if type(number) is int and not 0 <= number < vocabulary:
                shown = printable(str(number), 40)
                yield f"{name}: {key} {shown} is no token of a vocabulary of {vocabulary:,}"


def _largest_token(tokenizer: Json) -> int:
    """Return the largest id of a tokenizer, or −1 if it has none that can be read."""
    model = tokenizer.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens")
    ids = [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    if isinstance(pieces, dict):
        ids += pieces.values()
    elif isinstance(pieces, list):  # Unigram: pairs in the order of their ids
        ids.append(len(pieces) - 1)
    return max((number for number in ids if type(number) is int), default=-1)


def _json(content: Path | bytes | None, limit_bytes: int) -> Json:
    """Return a JSON object; an empty one for a file that is only copied and cannot be read."""
    if content is None:
        return {}
    try:
        data = read_bounded(content, limit_bytes) if isinstance(content, Path) else content
        value = parse_json(data, "", max_values=_MAX_VALUES)
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def _unscaled(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the 8-bit weights that lack scales: their values are only right up to a factor."""
    narrow = [n for n, info in checkpoint.tensors.items() if info.dtype.name in _EIGHT_BITS]
    scales = {n.rpartition(".")[0] for n in checkpoint.tensors if "scale" in n.rpartition(".")[2]}
    bare = [name for name in narrow if name.rpartition(".")[0] not in scales]
    if bare:
        first = printable(bare[0])
        more = f" and {len(bare) - 1:,} more" if len(bare) > 1 else ""
        yield f"8-bit weights without scales, read as they are: {first}{more}"
