"""Conversations as texts: the chat template of a checkpoint, in the sandbox of jinja2.

A template is a program of strangers. It reads its variables alone, has no clock, so that equal
conversations become equal texts, and its text is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moecc.errors import InputError, Problem, describe, describe_error, raise_problems
from moecc.formats.files import read_bounded
from moecc.support.documents import parse_json, parse_json_object
from moecc.support.untyped import Json, JsonDict

if TYPE_CHECKING:
    from jinja2 import Environment

Message = Json
"""An object with ``role`` and ``content``, and what else the template reads."""

ASSISTANT = "assistant"

CHAT_FILES = TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
"""The files beside a tokenizer that may hold its chat template."""

_LARGEST_TEMPLATE_BYTES = 16 << 20
_LARGEST_TEXT = 64 << 20


class ChatTemplate:
    """A chat template, as transformers takes it.

    Args:
      text: the template.
      where: its file, for messages.
      tokens: texts of special tokens, ``bos_token`` for instance.

    Raises:
      InputError: it is not a template.
    """

    def __init__(self, text: str, where: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError

        self._where, self._tokens = where, dict(tokens)
        try:
            self._template = _environment().from_string(text)
        except TemplateError as error:
            raise InputError(
                "not a chat template", where=where, found=describe_error(error)
            ) from None

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """Return the text of a conversation.

        Args:
          messages: the messages.
          asks: whether the text ends with the beginning of an answer.

        Raises:
          InputError: the template rejects the messages, or fails.
        """
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=[*messages], add_generation_prompt=asks, **self._tokens
            ):
                parts.append(part)
                size += len(part)
                if size > _LARGEST_TEXT:
                    raise ValueError(f"more than {_LARGEST_TEXT:,} characters")
        except Exception as error:  # whatever a program of strangers raises
            raise InputError(
                "the chat template fails", where=self._where, found=describe_error(error)
            ) from None
        return "".join(parts)

    def turns(self, messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
        """Yield each answer of the assistant, behind the text that asks for it.

        Raises:
          InputError: as `render`, or an answer does not begin as the template asks for one.
        """
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self.render(messages[:number], asks=True)
            text = self.render(messages[: number + 1], asks=False)
            if not text.startswith(prompt):
                raise InputError(
                    "the chat template writes an answer otherwise than it asks for one",
                    where=self._where,
                    expected=repr(prompt[-60:]),
                    found=repr(text[max(0, len(prompt) - 60) : len(prompt)]),
                )
            yield prompt, text[len(prompt) :]


def message_problems(messages: object, where: str) -> list[Problem]:
    """Return what is wrong with a list of messages."""
    expected = "a list of objects with the texts role and content"
    if not isinstance(messages, list) or not messages:
        return [Problem("not a conversation", where, expected, describe(messages))]
    return [
        Problem("not a message", f"{where}, message {number}", expected, describe(message))
        for number, message in enumerate(messages)
        if not isinstance(message, dict)
        or not all(isinstance(message.get(key), str) for key in ("role", "content"))
        or any("\ud800" <= c <= "\udfff" for c in message["content"])
    ]


def read_messages(text: str) -> list[Message]:
    """Return the messages of a prompt in JSON, or one of a user that is the text itself.

    Raises:
      InputError: it is JSON, and not a list of messages.
    """
    if not text.lstrip().startswith("["):
        return [{"role": "user", "content": text}]
    messages = parse_json(text.encode(), "--prompt")
    raise_problems(message_problems(messages, "--prompt"))
    assert isinstance(messages, list), "it has no problems"
    return messages


def read_template(files: Mapping[str, Path | bytes], where: str) -> ChatTemplate:
    """Return the chat template among the files beside a tokenizer.

    Args:
      files: by name.
      where: their folder, for messages.

    Raises:
      InputError: there is none, or it is not one.
    """
    settings: JsonDict = {}
    if (file := files.get(SETTINGS)) is not None:
        settings = parse_json_object(_content(file), f"{where}/{SETTINGS}")
    text = settings.get("chat_template")
    if isinstance(text, list):
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default")
    if (file := files.get(TEMPLATE)) is not None:
        text = _content(file).decode("utf-8", "replace")
    if not isinstance(text, str):
        raise InputError(
            "the tokenizer has no chat template",
            where=where,
            expected=f"{TEMPLATE}, or chat_template in {SETTINGS}",
            hint="write one of the two: the model was not trained on conversations",
        )
    return ChatTemplate(text, where, dict(_tokens(settings)))


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else read_bounded(file, _LARGEST_TEMPLATE_BYTES)


def _tokens(settings: Json) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            yield name, token


def _environment() -> Environment:
    """Return the environment of templates, with what those of transformers call."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks the answers in a template; here they are found by rendering without them."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own annotation

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def reject(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        # Not jinja2's own filter, which writes for pages of HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = reject
    environment.filters["tojson"] = to_json
    return environment
