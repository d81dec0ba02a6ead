"""``moecc tokens``: texts to token folders, which ``moecc train`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.heartbeat import Progress
from moecc.cli.options import FormatOption
from moecc.support.text import amount

if TYPE_CHECKING:
    from moecc.train.tokens.folder import TokenFacts


class Kind(StrEnum):
    """What becomes of a record."""

    documents = "documents"
    examples = "examples"
    labelled = "labelled"


class Split(StrEnum):
    """Where the documents of a text file end."""

    file = "file"
    line = "line"
    paragraph = "paragraph"
    form_feed = "form-feed"


@dataclass(frozen=True)
class TokensRequest:
    """The arguments and options of ``moecc tokens``."""

    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT…", help="Text, .jsonl, .parquet, either under .gz; or folders of them.",
            show_default=False,
        ),
    ]  # fmt: skip
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="MODEL|bytes",
            help="A folder, GGUF file or run with one; or bytes.",
        ),
    ]
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to write.")]
    kind: Annotated[
        Kind, typer.Option("--kind", help="Texts, or prompts with completions or labels.")
    ] = Kind.documents
    field: Annotated[
        str, typer.Option("--field", metavar="KEY", help="Of a text in JSON lines and Parquet.")
    ] = "text"
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEMPLATE", help="Of examples, with {KEY}.")
    ] = "{prompt}"
    completion: Annotated[
        str, typer.Option("--completion", metavar="TEMPLATE", help="Of examples, with {KEY}.")
    ] = "{completion}"
    split: Annotated[Split, typer.Option("--split", help="What is a document of a text file.")] = (
        Split.file
    )
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Names of files in folders: '*.md'."),
    ] = None
    hold_out: Annotated[
        float, typer.Option("--hold-out", metavar="SHARE", help="Into DIR/heldout; DIR/train.")
    ] = 0.0
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep documents that are equal to others.")
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an existing DIR.")] = False
    format: FormatOption = Format.human


def tokens(request: TokensRequest) -> None:
    """Write the token ids of TEXT… to the folder DIR."""
    from pathlib import Path

    from moecc.cli.console import Bar, report
    from moecc.support.process import signals_raised
    from moecc.support.record import to_json
    from moecc.train.tokens import documents
    from moecc.train.tokens.make import Making, make_tokens

    made = Making(
        texts=tuple(request.texts),
        tokenizer=request.tokenizer,
        format=documents.DocumentFormat(
            request.kind.value, request.field, request.split.value, request.prompt,
            request.completion,
        ),
        include=tuple(request.include or ()),
        hold_out=request.hold_out,
        deduplicate=not request.keep_duplicates,
    )  # fmt: skip
    with signals_raised(), Bar("encoding") as bar:
        found = make_tokens(made, Path(request.out), force=request.force, progress=bar)
    folders = {str(Path(request.out, name)): facts for name, facts in found.items()}
    data = {"folders": [{"folder": n, **to_json(facts)} for n, facts in folders.items()]}
    for one in data["folders"]:
        one.pop("schema")
    report("tokens", data, lambda: tokens_text(folders), request.format)


def tokens_text(folders: dict[str, TokenFacts]) -> str:
    """Return the human-readable report of what was written."""
    from moecc.train.tokens.folder import LABELLED

    lines = []
    for folder, facts in folders.items():
        noun = "labelled example" if facts.kind == LABELLED else facts.kind.removesuffix("s")
        lines.append(
            f"{folder}: {amount(facts.documents, noun)}, {amount(facts.tokens, 'token')} "
            f"({facts.dtype}, {facts.tokenizer})"
        )
        if facts.duplicates:
            verb = "was" if facts.duplicates == 1 else "were"
            lines.append(f"  {amount(facts.duplicates, 'duplicate')} {verb} left out")
        lines.extend(f"  label {label.text!r}: {label.count:,}" for label in facts.labels)
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "tokens",
        TokensRequest,
        tokens,
        "Example: moecc tokens corpus.jsonl --tokenizer SmolLM2-135M --out tokens --hold-out 0.01",
        progress=Progress.BAR,
    )
