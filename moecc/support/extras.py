"""What to install for an extra: the packages themselves; names that need some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, entry_points, requires
from importlib.util import find_spec
from typing import Any

from moecc.errors import MachineError

_MODULES = {
    "xla": ("jax",), "train": ("jax", "optax", "orbax", "tensorstore"),
    "tokenizers": ("tokenizers",), "export": ("flatbuffers",), "report": ("plotly",),
    "align": ("scipy",),
    "s3": ("s3fs",), "gs": ("gcsfs",), "hub": ("huggingface_hub",),
    "yaml": ("yaml",), "tensorboard": ("tensorboardX",), "wandb": ("wandb",),
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
    return " ".join(["python -m pip install", *(f"'{requirement}'" for requirement in missing)])


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


def lazy_names(
    module: str, names: tuple[str, ...], package: str, needs: Mapping[str, str]
) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose names are loaded when they are first used.

    Args:
      module: the name of the module.
      names: its public names.
      package: what has them, within the package of the backends.
      needs: the libraries that it imports, and the extra that installs each.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        missing = [library for library in needs if find_spec(library) is None]
        if missing:
            hint = install_hint(*(needs[library] for library in missing))
            raise MachineError(f"{module} needs {' and '.join(missing)}", hint=hint)
        for point in entry_points(group="moecc.backends"):
            return getattr(import_module(f"{point.module}.{package}"), name)
        raise MachineError(f"no installed package has {module}", hint="install moecc again")

    return attribute
