"""``moecc``: the commands, and the one module where errors become exit codes.

Exit codes: 0 done, 1 wrong for this input, 2 wrong by itself, 3 a check of meaning failed,
4 the machine, 70 a bug in moecc, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from moecc.cli.complete import words_of_bash
from moecc.cli.console import open_closed_streams, say, show_error, write_utf8
from moecc.errors import (
    MachineError,
    MoeccError,
    Problem,
    UsageError,
    described,
    escaped,
    nearest,
    printable,
)
from moecc.support.process import Terminated

if TYPE_CHECKING:
    from click import Command, Context, HelpFormatter

EPILOG = (
    "Exit codes: 0 done, 1 wrong for this input, 2 wrong by itself, 3 a check of meaning failed, "
    "4 the machine, 70 a bug in moecc, 130 interrupted, 143 terminated."
)

SUMMARIES = {
    "inspect": "Describe a model from its headers; no weights are read.",
    "import": "Print the graph of a model; no weights are read.",
    "opt": "Run a pipeline over a graph, verified after every pass.",
    "reduce": "Make a graph and a pipeline small while they fail.",
    "bisect": "Find the first pass of a pipeline that is wrong.",
    "replay": "Repeat a failure from its reproducer.",
    "convert": "Convert a model and write it to a folder or .gguf.",
    "clean": "Remove what killed conversions left beside outputs.",
    "verify": "Check the files, logits or plan of a model.",
    "run": "Run a model and write its logits or hidden states.",
    "lower": "Print a model as jax or XLA sees it.",
    "generate": "Continue a text.",
    "plan": "Predict memory, time and traffic, and find a mesh.",
    "compile": "Compile a step for a machine that is not attached.",
    "tokens": "Write the token ids of texts to a folder.",
    "train": "Train the model of a recipe, or resume a run.",
    "evaluate": "Evaluate models on token folders, in pairs.",
    "report": "Write a page that compares runs.",
    "specialise": "Show which tokens tell each expert from others.",
    "capture": "Take statistics of a model's values over texts.",
    "launch": "Run a command in several processes.",
    "lint": "Show what the design guide advises against.",
    "passes": "List the passes, or show one.",
}
"""The subcommands, in the order of ``--help``, with the lines that it prints; each is in a module
``moecc.cli.cmd_NAME``, which ``--help`` does not import."""

COMMANDS = tuple(SUMMARIES)


class Commands(TyperGroup):
    """The group of commands, which suggests the nearest name for an unknown one."""

    def resolve_command(
        self, ctx: Context, args: list[str]
    ) -> tuple[str | None, Command | None, list[str]]:
        """Return the command that `args` names."""
        name = args[0] if args else ""
        if name and self.get_command(ctx, name) is None and not name.startswith("-"):
            hint = nearest(name, COMMANDS) or f"commands: {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Context) -> list[str]:
        """Return the names of the commands in their own order."""
        return [c for c in COMMANDS if c in self.commands]

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write a line for each command, whether the group has it or not."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


def _version(value: bool) -> None:
    if value:
        from moecc.version import __version__

        print(f"moecc {__version__}")
        raise typer.Exit


def build_app(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return the application with the commands `names`: all take half of a start."""
    app = typer.Typer(
        cls=Commands,
        add_completion=True,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Turn dense Transformers into sparse ones, and say what that does to the function.",
        epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", callback=_version, is_eager=True
        ),
    ) -> None:
        pass

    for name in names:
        importlib.import_module(f"moecc.cli.cmd_{name}").register(app)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code; only SystemExit escapes."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        _check_words(words)
        return _run(words)
    except MoeccError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return _INTERRUPTED
    except Terminated as error:
        say(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has exited; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _out_of_memory()
    except OSError as error:
        return _os_error(error)
    except Exception as error:
        return _out_of_memory() if _is_out_of_memory(error) else _bug(error)
    except BaseException as error:
        # A file of the user may raise what ends Python, with exit code 0 even.
        if not _of_user(error):
            raise
        return _bug(error)


def _check_words(words: Sequence[str]) -> None:
    """Raise UsageError for arguments that are not UTF-8, which no text of moecc could contain.

    Python decodes each undecodable byte to a lone surrogate.
    """
    encoding = sys.getfilesystemencoding()
    hint = "rename the file" if encoding == "utf-8" else f"PYTHONUTF8=1, instead of {encoding}"
    problems = [
        Problem("an argument is not UTF-8", found=printable(word), hint=hint)
        for word in words
        if any("\ud800" <= c <= "\udfff" for c in word)
    ]
    if problems:
        raise UsageError(problems)


def _run(argv: list[str]) -> int:
    # What completes a line asks every command; anything else needs the one that it names.
    named = COMMANDS if _COMPLETION in os.environ else [w for w in argv if w in COMMANDS][:1]
    app = typer.main.get_command(build_app(named))
    try:
        with words_of_bash():
            result = app.main(argv, prog_name="moecc", standalone_mode=False)
    except typer.Abort:
        result = _INTERRUPTED
    except _UsageError as error:
        if not argv:  # this is the help
            say(error.format_message())
        else:
            show_error(_in_our_style(error, argv))
        return int(error.exit_code)
    # Some versions of typer turn an interrupt into this code themselves.
    if result == _INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


_INTERRUPTED = 130

_COMPLETION = "_MOECC_COMPLETE"
"""The environment variable that click reads for a program of this name."""

# Newer versions of typer bundle click, older ones import it; both derive this from its base.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _in_our_style(error: Any, argv: Sequence[str]) -> UsageError:
    """Return an error of click as moecc's own: the words, and which help answers them.

    Where an option lacks its value, click does not say of which command.
    """
    words = " ".join(error.format_message().split()).removesuffix(".")
    words = words[:1].lower() + words[1:] if not words[:2].isupper() else words
    named = [f"moecc {word}" for word in argv[:1] if word in COMMANDS]
    command = error.ctx.command_path if error.ctx is not None else (*named, "moecc")[0]
    return UsageError(words, hint=f"{command} --help")


_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


def _os_error(error: OSError) -> int:
    where = f"{error.filename}: " if error.filename else ""
    say(f"error: {where}{error.strerror or error}")
    return MachineError.exit_code if error.errno in _MACHINE else 1


def _out_of_memory() -> int:
    say("error: the machine has not enough memory for this")
    return MachineError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether Python or the dynamic loader was refused memory: neither has a kind for it."""
    kinds = {
        RuntimeError: ("can't start new thread",),
        ImportError: ("failed to map segment", "cannot allocate memory"),
    }
    return any(text in str(error) for text in kinds.get(type(error), ()))


def _of_user(error: BaseException) -> bool:
    from moecc.support.user_files import line_of_user

    return line_of_user(error) is not None


def _bug(error: BaseException) -> int:
    from moecc.support.user_files import line_of_user

    if getattr(error, "reproducer", None) is None and (place := line_of_user(error)):
        say(f"error: {place}: {described(error)}")
        if os.environ.get("MOECC_DEBUG"):
            traceback.print_exc()
        return 1
    path = getattr(error, "reproducer", None)
    if path is None:
        handle, path = tempfile.mkstemp(prefix="moecc-bug-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(escaped(f"moecc {' '.join(sys.argv[1:])}\n\n{traceback.format_exc()}"))
    say(f"error: a bug in moecc: {described(error)}")
    say(f"  what is needed to reproduce it is in {path}")
    if os.environ.get("MOECC_DEBUG"):
        traceback.print_exc()
    return 70


def entry() -> None:
    """Run as the console script."""
    open_closed_streams()
    write_utf8()
    code = main()
    # The last collection, at exit, would walk all modules and free what ends with the process.
    gc.freeze()
    sys.exit(code)
