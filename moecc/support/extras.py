"""What to install for an extra: the packages themselves, which any index has."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec

from moecc.errors import MachineError

_MODULES = {
    "xla": ("jax",), "train": ("jax", "optax", "orbax", "tensorstore"),
    "tokenizers": ("tokenizers",), "export": ("flatbuffers",), "report": ("plotly",),
    "align": ("scipy",),
    "s3": ("s3fs",), "gs": ("gcsfs",), "hub": ("huggingface_hub",),
    "yaml": ("yaml",),
}  # fmt: skip
"""What is imported of the packages of an extra."""


def require(feature: str, extras: Sequence[str], and_also: Sequence[str] = ()) -> None:
    """Check that everything is installed, before the first of it is missed.

    Args:
      feature: the feature that needs them, ``training``.
      extras: their names.
      and_also: extras that are looked for later, and named here if any of the others is missing.

    Raises:
      MachineError: some of it is missing; all of it is named, with the command that installs it.
    """
    named = dict.fromkeys(name for extra in extras for name in _MODULES[extra])
    missing = [name for name in named if find_spec(name) is None]
    if missing:
        hint = install_hint(*extras, *and_also)
        raise MachineError(f"{feature} needs {', '.join(missing)}", hint=hint)


def install_hint(*extras: str) -> str:
    """Return the command that installs what is missing of `extras`.

    It names packages, not ``moecc[extra]``, which needs moecc itself to be on an index.
    """
    needed = list(dict.fromkeys(r for extra in extras for r in _requirements(extra)))
    missing = list(filter(_is_missing, needed)) or needed
    return " ".join(["pip install", *(f"'{requirement}'" for requirement in missing)])


def _requirements(extra: str) -> list[str]:
    """Return the requirements of an extra; the extra itself where moecc is not installed."""
    try:
        every = requires("moecc") or []
    except PackageNotFoundError:
        every = []
    marked = [text.split(";") for text in every if ";" in text]
    requirements = [
        r.strip() for r, marker in marked if marker.split("==")[-1].strip(" '\"") == extra
    ]
    return requirements or [f"moecc[{extra}]"]


def _is_missing(requirement: str) -> bool:
    """Whether a package, or one of those that its own extras add, is not installed."""
    name = requirement
    for mark in "[<>=! ":
        name = name.split(mark)[0]
    try:
        distribution(name)
    except PackageNotFoundError:
        return True
    return "[" in requirement
