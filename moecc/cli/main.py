"""``moecc``: the commands, and the one module where errors become exit codes.

Exit codes: 0 done, 1 wrong for this input, 2 wrong by itself, 3 a check of meaning failed,
4 the machine, 70 a bug in moecc, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import click
from click.shell_completion import CompletionItem

from moecc.cli.commands import command_of
from moecc.errors import (
    MachineError,
    MoeccError,
    Problem,
    UsageError,
    describe_error,
    escaped,
    nearest,
    printable,
    raise_problems,
)
from moecc.jobs import COMMANDS
from moecc.support.console import SHELL_VARIABLE, open_closed_streams, say, show_error, write_utf8
from moecc.support.process import Terminated

EPILOG = (
    "Exit codes: 0 done, 1 wrong for this input, 2 wrong by itself, 3 a check of meaning failed, "
    "4 the machine, 70 a bug in moecc, 130 interrupted, 143 terminated."
)


ELSEWHERE = {
    "diff": "moecc prove A B compares two models, moecc opt --diff shows what each pass changes",
}
"""Commands that one may expect, and what serves instead."""


class Commands(click.Group):
    """The commands of `moecc.jobs`, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in their own order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name."""
        return command_of(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that `args` name; the nearest one is suggested for an unknown one."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = ELSEWHERE.get(args[0]) or nearest(args[0], COMMANDS)
            hint = hint or f"commands: {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each command, none of which is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands and options that begin so; no command is imported."""
        names = [CompletionItem(n, help=h) for n, h in COMMANDS.items() if n.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


def _print_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from moecc.version import __version__

        print(f"moecc {__version__}")
        ctx.exit()


def _complete(ctx: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    if shell is not None:
        from moecc.cli.complete import install_completion, shell_script

        is_installed = parameter.name == "install_completion"
        print(install_completion(shell) if is_installed else shell_script(shell))
        ctx.exit()


def build_app() -> Commands:
    """Return the application."""
    eager: dict[str, Any] = {"is_eager": True, "expose_value": False}
    shell: dict[str, Any] = {
        "is_flag": False,
        "flag_value": "",
        "metavar": "[SHELL]",
        "callback": _complete,
    }
    return Commands(
        "moecc",
        params=[
            click.Option(
                ["--version"],
                is_flag=True,
                callback=_print_version,
                help="Print the version.",
                **eager,
            ),
            click.Option(
                ["--install-completion"],
                help="Teach a shell to complete commands.",
                **shell,
                **eager,
            ),
            click.Option(
                ["--show-completion"],
                help="Print the script by which a shell completes commands.",
                **shell,
                **eager,
            ),
        ],
        no_args_is_help=True,
        help="Turn dense Transformers into sparse ones, and say what that does to the function.",
        epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code; only SystemExit escapes."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        encoding = sys.getfilesystemencoding()
        hint = "give text in UTF-8, and rename a file whose name is not"
        if encoding != "utf-8":
            hint = f"PYTHONUTF8=1, instead of {encoding}"
        problems = [
            Problem("an argument is not UTF-8", found=printable(word), hint=hint)
            for word in words
            if any("\ud800" <= c <= "\udfff" for c in word)
        ]
        raise_problems(problems, UsageError)
        return _run(words)
    except MoeccError as error:
        show_error(error)
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as error:
        return _end(error)
    except BrokenPipeError:
        # The reader of our output has exited; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _out_of_memory()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror or error}")
        return MachineError.exit_code if error.errno in _MACHINE else 1
    except Exception as error:
        if (signalled := _signal_behind(error)) is not None:
            return _end(signalled)
        return _out_of_memory() if _is_out_of_memory(error) else _bug(error)
    except BaseException as error:
        # A file of the user may raise what ends Python, with exit code 0 even.
        if not _of_user(error):
            raise
        return _bug(error)


def _run(argv: list[str]) -> int:
    try:
        with _words_of_bash():
            result = build_app().main(argv, prog_name="moecc", standalone_mode=False)
    except click.Abort as error:
        # click ends so for an EOFError, too, which whatever reads a file that is cut off may raise.
        raise error.__cause__ or KeyboardInterrupt() from None
    except SystemExit as error:
        # click ends so, with 1, where the reader of our output has exited.
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise
    except click.UsageError as error:
        if not argv:  # this is the help
            say(error.format_message())
        else:
            show_error(_in_our_style(error, argv))
        return error.exit_code
    return result if isinstance(result, int) else 0


def _words_of_bash() -> AbstractContextManager[None]:
    """Return the context in which bash gets whole words, where a shell asks for a completion."""
    if SHELL_VARIABLE not in os.environ:
        return nullcontext()
    from moecc.cli.complete import words_of_bash

    return words_of_bash()


_INTERRUPTED = 130


def _signal_behind(error: BaseException | None) -> KeyboardInterrupt | Terminated | None:
    """Return the signal in whose wake an error occurred, or None.

    Python raises a signal between any two of its instructions, also where a lock is half released.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__context__
    return error


def _end(signalled: KeyboardInterrupt | Terminated) -> int:
    """Say which signal ended the command, and return its exit code."""
    if isinstance(signalled, Terminated):
        say(str(signalled))
        return signalled.exit_code
    say("interrupted")
    return _INTERRUPTED


def _in_our_style(error: click.UsageError, argv: Sequence[str]) -> UsageError:
    """Return an error of click as moecc's own: the words, and which help answers them.

    Where an option lacks its value, click does not say of which command.
    """
    words = " ".join(error.format_message().split()).removesuffix(".")
    words = words[:1].lower() + words[1:] if not words[:2].isupper() else words
    named = [f"moecc {word}" for word in argv[:1] if word in COMMANDS]
    command = error.ctx.command_path if error.ctx is not None else (*named, "moecc")[0]
    hint = f"{command} --help"
    takes_passes = (
        any(p.name == "pipeline" for p in error.ctx.command.params) if error.ctx else False
    )
    if "unexpected extra argument" in words and takes_passes:
        hint = f"passes are given by -p; {hint}"
    if isinstance(error, click.NoSuchOption):
        words = f"no such option {error.option_name!r}"
        near = nearest(error.option_name, error.possibilities or ())
        hint = f"{near} {hint}" if near else hint
        if error.option_name == "--json":
            hint = "--format json"
        elif argv[:1] == ["launch"]:
            hint = f"the command to run stands after --, with its options; {hint}"
    return UsageError(words, hint=hint)


_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


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

    if getattr(error, "reproducer", None) is None and (line := line_of_user(error)):
        say(f"error: {line}: {describe_error(error)}")
        if os.environ.get("MOECC_DEBUG"):
            traceback.print_exc()
        return 1
    path = getattr(error, "reproducer", None)
    if path is None:
        handle, path = tempfile.mkstemp(prefix="moecc-bug-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(escaped(f"moecc {' '.join(sys.argv[1:])}\n\n{traceback.format_exc()}"))
    say(f"error: a bug in moecc: {describe_error(error)}")
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
