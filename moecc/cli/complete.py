"""Values that a shell completes: passes and their options, presets, machines, targets, types.

A completion function takes what is typed of a word and returns whole words that begin so.  Nothing
is returned where a file may be meant, and then the shell offers files.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

from moecc.errors import InputError
from moecc.support.console import SHELL_VARIABLE

_PASS = re.compile(r"@?[a-z0-9-]*\Z")
_OPTION = re.compile(r"(@?)([a-z0-9-]+)\{(?:[^{}]*\s)?([a-z0-9-]*)\Z")
_VALUE = re.compile(r"(@?)([a-z0-9-]+)\{(?:[^{}]*\s)?([a-z0-9-]+)=([^\s{}]*)\Z")


def pipelines(incomplete: str) -> list[str]:
    """Return pipelines whose last pass, option or value is completed."""
    at = incomplete.rfind(",") + 1 if "{" not in incomplete.rpartition("}")[2] else None
    start = (incomplete.rfind(",", 0, incomplete.rfind("{")) + 1) if at is None else at
    done, last = incomplete[:start], incomplete[start:]
    return [f"{done}{text}" for text in _passes(last) if text.startswith(last)]


def passes(incomplete: str) -> list[str]:
    """Return the names of passes."""
    from moecc.rewrite.pipeline import installed

    return _beginning(incomplete, installed().names())


def models(incomplete: str) -> list[str]:
    """Return presets, where none but them can be meant."""
    from moecc.presets import PREFIX, preset_names

    if not incomplete:
        return []
    return _beginning(incomplete, (f"{PREFIX}{name}" for name in preset_names()))


def models_or_pipelines(incomplete: str) -> list[str]:
    """Return presets, and pipelines."""
    return [*models(incomplete), *pipelines(incomplete)]


def machines(incomplete: str) -> list[str]:
    """Return machines by kind and chip, their topologies, and what clouds call them."""
    from moecc.plan.machines import short_names, table

    chips = [f"{kind}:{chip}:" for kind in ("tpu", "gpu") for chip in table()[kind]]
    if incomplete.count(":") == 2:
        return _beginning(incomplete, _sizes(*incomplete.split(":")[:2]))
    short = short_names() if incomplete else ()
    return _beginning(incomplete, (*chips, "cpu", "cpu:", *short))


def _sizes(kind: str, chip: str) -> Iterator[str]:
    """Yield the machines of a chip with their topologies, or numbers of whole nodes."""
    from moecc.plan.machines import table, topologies

    if chip not in table().get(kind, {}):
        return
    if kind == "tpu":
        yield from (f"tpu:{chip}:{'x'.join(map(str, dims))}" for dims in topologies(chip))
    elif kind == "gpu":
        nodes = (table()["gpu"][chip]["gpus_per_node"] * 2**power for power in range(5))
        yield from (f"gpu:{chip}:{count}" for count in nodes)


def targets(incomplete: str) -> list[str]:
    """Return what a conversion writes: families, auto, and the architectures of GGUF."""
    from moecc.families.registry import CONFIGS
    from moecc.translate.gguf import PREFIX, architectures

    gguf = (f"{PREFIX}{name}" for name in architectures())
    return _beginning(incomplete, ("auto", *CONFIGS, *gguf))


def float_types(incomplete: str) -> list[str]:
    """Return the floating-point types."""
    from moecc.types import DTYPES

    return _beginning(incomplete, (name for name, type in DTYPES.items() if type.is_float))


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)})


def _passes(last: str) -> Iterator[str]:
    """Yield what the last pass of a pipeline may be completed to."""
    from moecc.rewrite.passes import options
    from moecc.rewrite.pipeline import TemplatePass, installed

    registry = installed()
    if _PASS.match(last):
        is_template = last.startswith("@")
        for name in registry.names():
            if not is_template:
                yield name
            elif issubclass(registry.get(name), TemplatePass):
                yield f"@{name}"
        return
    match = _OPTION.match(last) or _VALUE.match(last)
    if match is None or match[2] not in registry.names():
        return
    there = options(registry.get(match[2]))
    if match.re is _OPTION:
        begun = last[: match.start(3)]
        yield from (f"{begun}{name}=" for name in there if f"{name}=" not in begun)
    elif match[3] in there:
        yield from (f"{last[: match.start(4)]}{value}" for value in _values(there[match[3]].type))


def _values(type: object) -> Iterator[str]:
    """Yield the words that an option may be, where it is one of a few."""
    if type is bool:
        yield from ("true", "false")
    elif type in (None, NoneType):
        yield "none"
    elif get_origin(type) is Literal:
        yield from map(str, get_args(type))
    else:
        for part in get_args(type):
            yield from _values(part)


# The script of a shell, and how bash splits words.

_WORDS, _CURRENT = "COMP_WORDS", "COMP_CWORD"
_START_FILES = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}


def _supported(shell: str) -> str:
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in _START_FILES:
        raise InputError("the shell cannot complete commands", where="SHELL",
                         expected=", ".join(_START_FILES), found=shell or "nothing")  # fmt: skip
    return shell


def shell_script(shell: str) -> str:
    """Return the script by which a shell, the user's by default, completes commands.

    Raises:
      InputError: the shell is not one of bash, zsh and fish.
    """
    from click import Command
    from click.shell_completion import get_completion_class

    complete = get_completion_class(_supported(shell))
    assert complete is not None, "click knows the shells of _START_FILES"
    return complete(Command("moecc"), {}, "moecc", SHELL_VARIABLE).source()


def install_completion(shell: str) -> str:
    """Write the script to a file that a shell reads when it starts, and return a line on that.

    Raises:
      InputError: as `shell_script`.
    """
    shell, home = _supported(shell), Path.home()
    script, start = home / f".local/share/moecc/complete.{shell}", home / _START_FILES[shell]
    for path in (script, start):
        path.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(shell_script(shell), "utf-8")
    line = f"source {script}\n"
    if not start.exists() or line not in start.read_text("utf-8"):
        with start.open("a", encoding="utf-8") as file:
            file.write(line)
    return f"{start} reads {script}: start {shell} anew"


@contextmanager
def words_of_bash() -> Iterator[None]:
    """Complete whole words in bash, which splits them at ``:`` and ``=`` and completes a part.

    The parts are joined for the completion, and from its lines (``plain,WORD``) only the part of
    the word that bash replaces is passed on.
    """
    if os.environ.get(SHELL_VARIABLE) != "bash_complete" or _CURRENT not in os.environ:
        yield
        return
    front = _join(os.environ)
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")  # click writes bytes
    try:
        with redirect_stdout(printed):
            yield
    finally:
        printed.seek(0)
        for line in printed.read().splitlines():
            kind, _, word = line.partition(",")
            print(f"{kind},{word.removeprefix(front)}")


def _join(environ: MutableMapping[str, str]) -> str:
    """Join the parts of the word that is completed; return the part before the last of them."""
    words = environ.get(_WORDS, "").split("\n")
    current = int(environ[_CURRENT])
    words += [""] * (current + 1 - len(words))
    first = current
    while first > 1 and (words[first] in (":", "=") or words[first - 1] in (":", "=")):
        first -= 1
    joined = "".join(words[first : current + 1])
    if first == current or words[first].startswith("-"):
        return ""
    front = joined if words[current] in (":", "=") else joined.removesuffix(words[current])
    environ[_WORDS] = "\n".join([*words[:first], joined, *words[current + 1 :]])
    environ[_CURRENT] = str(first)
    return front
