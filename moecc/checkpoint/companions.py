"""Companion files, besides the weights, that an export copies byte for byte.

Tokenizers are copied, never saved again: transformers 5 writes tokenizer classes that version 4
rejects.  Code and pickles are never copied, and the model card is written anew.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from moecc.checkpoint.files import file_fault
from moecc.checkpoint.limits import is_recordable
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.sniff import PICKLE, ZIP, sniff_file

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
_TEMPLATES = "additional_chat_templates"
_CODE = {".py", ".pyc", ".so"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_ARRAYS = {".h5", ".keras", ".msgpack", ".nemo"}


def find_companions(folder: Path, problems: Problems) -> dict[str, Path]:
    """Return the files to copy by their path in `folder`; unusable ones go to `problems`."""
    names = [name for name in os.listdir(folder) if is_companion(name)]
    templates = folder / _TEMPLATES
    if templates.is_dir():
        found = (name for name in os.listdir(templates) if name.endswith(".jinja"))
        names += [f"{_TEMPLATES}/{name}" for name in found]
    companions = {}
    for name in sorted(names):
        path = folder / name
        if path.is_dir():
            continue
        if not is_recordable(name):
            problems.add(
                f"an export would copy {quoted(name)}, whose name no manifest allows",
                where=str(folder),
                hint="rename it, or move it out of the folder",
            )
            continue
        if _is_usable(path, folder, problems):
            companions[name] = path
    return companions


def is_companion(name: str) -> bool:
    """Return whether a file of this name is copied into an export."""
    if Path(name).suffix.lower() in _CODE | _PICKLES | _ARRAYS:
        return False
    return any(fnmatchcase(name, pattern) for pattern in _COPIED)


def _is_usable(path: Path, folder: Path, problems: Problems) -> bool:
    if fault := file_fault(path, folder):
        problems.extend((fault,))
        return False
    kind = sniff_file(path)
    if kind in (PICKLE, ZIP):
        problems.add(
            "a file that an export would copy does not have the type of its name",
            where=str(path),
            found=kind.text,
            hint="remove it from the folder",
        )
        return False
    return True
