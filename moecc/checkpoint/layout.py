"""Select the weight files of a folder, and report ambiguous or missing ones."""

from __future__ import annotations

import re
from pathlib import Path

from moecc.checkpoint.files import file_fault
from moecc.checkpoint.index import SHARD_SUFFIX, Index, read_index
from moecc.checkpoint.problems import Problems, quoted
from moecc.errors import InputError

SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|nemo|keras|distcp)", re.DOTALL)
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state).*", re.DOTALL)
_SHOWN_NAMES = 10
_NONE = "the folder has no weights"


def choose_weights(
    path: Path, names: set[str], problems: Problems
) -> tuple[Index | None, list[str]]:
    """Return the index of a folder, if there is one, and the names of the files to open.

    Args:
      path: the folder.
      names: the files in the folder.
      problems: receives the errors; files that are known to be irrelevant are not reported.
    """
    numbered = sorted(name for name in names if _SHARD.fullmatch(name))
    if ADAPTER_CONFIG in names and names.intersection((SINGLE_NAME, INDEX_NAME, *numbered)):
        problems.add(
            "the folder holds a model and an adapter: transformers would load the adapter, too",
            where=str(path),
            expected="one of the two",
            found=ADAPTER_CONFIG,
            hint="move adapter_config.json out if the model is meant; else merge the adapter with "
            "PEFT (merge_and_unload), and give that model",
        )
    if INDEX_NAME in names:
        index = _read_index(path, problems)
        if index is None:
            return None, []
        _refuse_strangers(path, names, numbered, index, problems)
        return index, index.shards
    if SINGLE_NAME in names:
        if numbered:
            _ambiguous(path, [SINGLE_NAME, *numbered], problems)
        return None, [SINGLE_NAME]
    if numbered:
        problems.add(
            f"the folder has shards but no {INDEX_NAME}",
            where=str(path),
            found=_some(numbered),
            hint="fetch the index from where the shards came from",
        )
        return None, numbered
    _no_weights(path, names, problems)
    return None, []


def _read_index(path: Path, problems: Problems) -> Index | None:
    file = path / INDEX_NAME
    if fault := file_fault(file, path):
        problems.extend((fault,))
        return None
    try:
        return read_index(file, problems)
    except InputError as error:
        problems.extend(error.problems)
        return None


def _refuse_strangers(
    path: Path, names: set[str], numbered: list[str], index: Index, problems: Problems
) -> None:
    """Report weight files that transformers might load instead of those the index names."""
    shards = set(index.shards)
    if SINGLE_NAME in names and SINGLE_NAME not in shards:
        _ambiguous(path, [SINGLE_NAME, INDEX_NAME], problems)
    leftover = [name for name in numbered if name not in shards]
    if leftover and shards:
        problems.add(
            "the folder has shards that the index does not name, perhaps of an earlier run",
            where=str(path),
            found=_some(leftover),
            hint="move them out of the folder",
        )


def _ambiguous(path: Path, found: list[str], problems: Problems) -> None:
    problems.add(
        "the folder holds more than one set of weights",
        where=str(path),
        expected=f"either {SINGLE_NAME}, or shards with {INDEX_NAME}",
        found=_some(found),
        hint="move the set that is not wanted out of the folder",
    )


def _no_weights(path: Path, names: set[str], problems: Problems) -> None:
    """Report what a folder without a usable set of weights holds instead."""
    expected = f"{SINGLE_NAME}, or shards with {INDEX_NAME}"
    what, found, hint = _what_instead(names)
    problems.add(what, where=str(path), expected=expected, found=found, hint=hint)


def _what_instead(names: set[str]) -> tuple[str, str | None, str | None]:
    pickled = sorted(n for n in names if _PICKLED.fullmatch(n) and not _NOT_WEIGHTS.fullmatch(n))
    others = sorted(name for name in names if name.endswith(SHARD_SUFFIX))
    adapters = [name for name in others if name.startswith("adapter_")]
    original = [name for name in others if name.startswith("consolidated")]
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if adapters:
        hint = "merge it into its base model first, then convert the merged model"
        return "the folder holds an adapter, not a model", _some(adapters), hint
    if original:
        hint = "convert them to the Hugging Face layout first, or fetch the files of that layout"
        return "the weights are in Mistral's own layout", _some(original), hint
    if others:
        hint = f"rename the file that you mean to {SINGLE_NAME}"
        return "the folder holds only variants of the weights", _some(others), hint
    if gguf:
        hint = f"give the file as the source, e.g. {gguf[0]!r}"
        return "the folder holds GGUF files", _some(gguf), hint
    if any(_MEGATRON.fullmatch(name) for name in names):
        return "this is a checkpoint of Megatron, which is made of pickles", None, _FROM_MEGATRON
    if pickled:
        convert = (
            "moecc never opens pickles, because unpickling runs code; fetch the safetensors "
            "version of the model, or convert it in a sandbox with a tool that you trust"
        )
        return "the folder has its weights only as pickles", _some(pickled), convert
    if not names:
        return "the folder is empty", None, None
    if kind := _other_format(names):
        return kind[0], None, kind[1]
    nested = [name for name in ("snapshots", "blobs") if name in names]
    inside = "give the folder below snapshots/ whose name is the revision" if nested else None
    return _NONE, None, inside


def lacks_weights(names: set[str]) -> bool:
    """Whether a folder with these files holds no weights of any kind, and no part of them."""
    return not any(n.endswith((SHARD_SUFFIX, INDEX_NAME)) for n in names) and (
        _what_instead(names)[0] == _NONE
    )


_MEGATRON = re.compile(
    r"latest_checkpointed_iteration\.txt|iter_[0-9]{7}|mp_rank_[0-9_]+|.*\.distcp|common\.pt",
    re.DOTALL,
)
_FROM_MEGATRON = (
    "moecc never opens pickles, because unpickling runs code; export the model to a Hugging Face "
    "folder with Megatron-Bridge, or with Megatron's tools/checkpoint/convert.py"
)
_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "orbax.checkpoint"}
_ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
_NO_TREE = (
    "moecc finds no tree of arrays in it: give the folder that has _METADATA, or export it to a "
    "Hugging Face folder with the framework that wrote it"
)


def _other_format(names: set[str]) -> tuple[str, str] | None:
    """Return the name of another framework's checkpoint, and what to do with it."""
    if any(_ORBAX_UNFINISHED in name for name in names):
        hint = "its writer was interrupted: take an earlier step, and export that"
        return "this is an Orbax checkpoint that was never completed", hint
    if names & _ORBAX:
        return "this is an Orbax checkpoint", _NO_TREE
    return None


def _some(names: list[str]) -> str:
    shown = ", ".join(quoted(name) for name in names[:_SHOWN_NAMES])
    rest = len(names) - _SHOWN_NAMES
    return f"{shown} and {rest:,} more" if rest > 0 else shown
