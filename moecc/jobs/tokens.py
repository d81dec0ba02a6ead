"""``moecc tokens``: texts to token folders, which ``moecc train`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from moecc.jobs.command import Force, Report, Spelling
from moecc.support.console import Bar, say
from moecc.support.process import signals_raised
from moecc.support.text import amount

if TYPE_CHECKING:
    from moecc.train.tokens.folder import TokenFacts


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


def tokens(
    texts: Annotated[Sequence[str], Spelling("TEXT…")],
    *,
    tokenizer: Annotated[str, Spelling("MODEL|bytes")],
    out: Annotated[str, Spelling("DIR")],
    kind: Literal["documents", "examples", "labelled", "chat"] = "documents",
    field: Annotated[str | None, Spelling("KEY")] = None,
    prompt: Annotated[str, Spelling("TEMPLATE")] = "{prompt}",
    completion: Annotated[str, Spelling("TEMPLATE")] = "{completion}",
    split: Literal["file", "line", "paragraph", "form-feed"] = "file",
    include: Annotated[Sequence[str], Spelling("GLOB")] = (),
    hold_out: Annotated[float, Spelling("SHARE")] = 0.0,
    keep_duplicates: bool = False,
    force: Force = False,
) -> Report:
    """Write the token ids of texts to a folder.

    moecc train, evaluate, specialise and capture read such folders.

    Args:
      texts: Text file, .jsonl, either also under .gz, .parquet or .arrow; or a folder of them.
      tokenizer: Folder, GGUF file or run whose tokenizer is used; or bytes.
      out: Folder to write.
      kind: Kind of the records: texts, prompts with completions or labels, or conversations.
      field: Key of the text, text by default, or of the messages, messages by default.
      prompt: Template of an example's prompt, in which {KEY} stands for a value of the record.
      completion: Template of an example's completion, likewise.
      split: Unit of a text file that is a document.
      include: Pattern of the names of files in folders, for example '*.md'; may be repeated.
      hold_out: Share of the documents that goes to DIR/heldout, the others to DIR/train.
      keep_duplicates: Keep documents that are equal to others.

    Example:
      moecc tokens corpus.jsonl --tokenizer SmolLM2-135M --out tokens --hold-out 0.01
    """
    from pathlib import Path

    from moecc.support.record import to_json
    from moecc.train.tokens import documents
    from moecc.train.tokens.make import Making, make_tokens

    field = field or (documents.MESSAGES if kind == documents.CHAT else "text")
    making = Making(
        texts=tuple(texts),
        tokenizer=tokenizer,
        format=documents.DocumentFormat(kind, field, split, prompt, completion),
        include=tuple(include),
        hold_out=hold_out,
        deduplicate=not keep_duplicates,
    )
    with signals_raised(), Bar("encoding") as bar:
        parts = make_tokens(making, Path(out), force=force, progress=bar)
    for remark in documents.format_remarks(making.format):
        say(f"remark: {remark}")
    sources = next(iter(parts.values())).sources
    if empty := [source for source in sources if source.empty]:
        left_out = amount(sum(source.empty for source in empty), "empty document")
        say(f"remark: left out: {left_out}, of {empty[0].name} for example")
    names = [source.name for source in sources]
    if plain := [n for n in names if n.lower().removesuffix(".gz").endswith(".json")]:
        files = amount(len(plain), ".json file")
        say(f"remark: read as text: {files}, such as {plain[0]}; records are read from .jsonl")
    folders = {str(Path(out, name)): facts for name, facts in parts.items()}
    rows = [
        {"folder": folder, **{k: v for k, v in to_json(facts).items() if k != "schema"}}
        for folder, facts in folders.items()
    ]
    return Report("tokens", {"folders": rows}, lambda: tokens_text(folders))
