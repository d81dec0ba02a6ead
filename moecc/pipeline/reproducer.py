"""Reproducers: all that `moecc replay` needs to let a pipeline fail once more, in a folder.

The input is a ``.moe`` file whose first comments hold the pipeline and its options; files of own
passes are copied beside it.  A reproducer may come from a stranger: it names the files of its
passes, and only the user's ``--load`` runs them.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from moecc.errors import InputError, escaped
from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.pipeline.passes import Pass
from moecc.pipeline.text import LOADED
from moecc.version import __version__

_TITLE = "# moecc reproducer: "
_REPLAY = "# replay: "


@dataclass(frozen=True)
class Replay:
    """How a failure is repeated.

    Attributes:
      pipeline: the passes.
      seed: of the random choices.
      allow_unmatched: whether a pass that must match may match nothing.
      check: whether each pass is held to its promise, as by ``opt --check``.
      load: the files of own passes; in a reproducer relative to its folder.
      compare: what else is compared after the passes: ``run``, ``weights`` or nothing.
      moecc: the version that failed.
    """

    pipeline: str
    seed: int = 0
    allow_unmatched: bool = False
    check: bool = False
    load: tuple[str, ...] = ()
    compare: str = ""
    moecc: str = __version__


def temporary_folder() -> Path:
    """Return a new folder for a reproducer, outside of the working folder."""
    return Path(tempfile.mkdtemp(prefix="moecc-crash-"))


def loaded_files(passes: Iterable[Pass]) -> tuple[str, ...]:
    """Return the files of own passes, each once."""
    modules = (type(item).__module__ for item in passes)
    files = (sys.modules[m].__file__ for m in modules if m.startswith(LOADED))
    return tuple(dict.fromkeys(file for file in files if file))


def write_reproducer(folder: Path, text: str, replay: Replay, title: str, notes: str = "") -> Path:
    """Write a reproducer and return its path; no existing file is overwritten.

    Args:
      folder: where; it is made if it does not exist.
      text: the graph.
      replay: the pipeline and its options.
      title: what failed, in one line.
      notes: further comments, such as a traceback.

    Raises:
      OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"moecc-crash-{number}.moe").exists():
        number += 1
    # Files of own passes are copied beside the reproducer.
    names = tuple(f"moecc-crash-{number}-{Path(file).name}" for file in replay.load)
    for file, name in zip(replay.load, names, strict=True):
        shutil.copyfile(file, folder / name)
    content = _content(text, replace(replay, load=names), title, notes)
    path.write_text(content, encoding="utf-8")
    return path


def reproducer_text(graph: Graph, replay: Replay, title: str) -> str:
    """Return the text of a reproducer, whose files of own passes are where they are."""
    return _content(print_graph(graph), replay, title, "")


def _content(text: str, replay: Replay, title: str, notes: str) -> str:
    head = [
        f"{_TITLE}{title}".splitlines()[0],
        f"{_REPLAY}{json.dumps(asdict(replay))}",
        f"# pipeline: {replay.pipeline}",
        f"# seed: {replay.seed}",
        "#",
        *(f"# {line}".rstrip() for line in notes.splitlines()),
    ]
    return f"{escaped(chr(10).join(head))}\n{text}"


def is_reproducer(file: str) -> bool:
    """Return whether a file begins as a reproducer does."""
    path = Path(file)
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(len(_TITLE)) == _TITLE


def read_reproducer(path: Path) -> Replay:
    """Return how a reproducer is repeated; the files of its own passes by their paths.

    Raises:
      InputError: the file has no such comment, or one of another version.
    """
    line = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for _ in range(8):
            line = file.readline(1 << 20)
            if line.startswith(_REPLAY):
                break
    try:
        stated = json.loads(line.removeprefix(_REPLAY)) if line.startswith(_REPLAY) else {}
        replay = Replay(**{**stated, "load": tuple(stated["load"])})
        _check_types(replay)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            "not a reproducer",
            where=str(path),
            expected=f"a comment {_REPLAY.strip()!r} in its first lines, which moecc wrote",
            hint="moecc opt runs a pipeline over any graph",
        ) from None
    # Beside the reproducer, or where the user said that it is.
    load = tuple(str(path.parent / str(name)) for name in replay.load)
    return replace(replay, load=load)


def _check_types(replay: Replay) -> None:
    """Raise TypeError for a field of another type than its default; a boolean is no number."""
    for field in fields(Replay):
        default = "" if field.name == "pipeline" else field.default
        if type(getattr(replay, field.name)) is not type(default):
            raise TypeError(field.name)
    if not all(isinstance(name, str) for name in replay.load):
        raise TypeError("load")


def check_loaded(path: Path, stated: Replay, files: Sequence[str]) -> None:
    """Check that the user names the files of own passes that a reproducer needs.

    Args:
      path: the reproducer.
      stated: its content.
      files: the files of ``--load``.

    Raises:
      InputError: the reproducer needs own passes, and `files` is empty.
    """
    if not stated.load or files:
        return
    names = list(map(shlex.quote, stated.load))
    raise InputError(
        "the reproducer needs passes of your own",
        where=str(path),
        expected="--load FILE: a file that a reproducer names is run only if you name it, too",
        found=f"{', '.join(names)} in its comment {_REPLAY.strip()!r}",
        hint=f"if you trust their code: {' '.join(f'--load {name}' for name in names)}",
    )


def save_crash(
    folder: Callable[[], Path], text: str, replay: Replay, error: Exception, title: str
) -> str:
    """Write the reproducer of a crash; return how it is repeated, or why it was not written."""
    notes = "".join(traceback.format_exception(error))
    try:
        path = write_reproducer(folder(), text, replay, title, notes)
    except OSError as failure:
        return f"the reproducer could not be written: {failure}"
    words = ["moecc replay", shlex.quote(str(path))]
    words += [f"--load {shlex.quote(file)}" for file in read_reproducer(path).load]
    return f"{' '.join(words)} repeats it: the input, the pipeline and the seed are in there"
