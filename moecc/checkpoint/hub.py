"""Models of the Hugging Face hub, through the package huggingface_hub where it is installed.

``hf:ORG/NAME`` or ``hf:ORG/NAME@REVISION`` is fetched; a plain ``ORG/NAME`` that is no folder is
only looked up in the cache, so that a mistyped path asks nobody.
"""

from __future__ import annotations

import re
from pathlib import Path

from moecc.errors import MachineError, UsageError, printable

PREFIX = "hf:"
FETCHED = (
    "*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken",
    "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""The files that moecc reads or copies; pickles and code are not fetched."""

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


def fetch(source: str) -> Path:
    """Return the folder of ``hf:ORG/NAME[@REVISION]``, after fetching what is not in the cache.

    Raises:
      UsageError: it is not such a name.
      MachineError: huggingface_hub is not installed, or the hub does not give the model.
    """
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    if not is_model_id(name):
        raise UsageError(
            "not the name of a model of the hub",
            expected="hf:ORG/NAME, or hf:ORG/NAME@REVISION",
            found=printable(source),
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MachineError(
            "models of the hub need a package that is missing",
            where=source,
            hint="pip install huggingface_hub; or fetch the folder otherwise, and give its path",
        ) from None
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED))
        )
    except Exception as error:  # of its own kinds, of HTTP libraries and of the system
        first = str(error).strip().split("\n")[0]
        raise MachineError(
            "the hub does not give the model", where=source,
            found=printable(f"{type(error).__name__}: {first}"),
            hint="is the name right, and the hub reachable; is a token needed (hf auth login)?",
        ) from None  # fmt: skip
