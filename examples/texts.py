"""Text to work on, which every Python brings along."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from moecc.errors import MachineError


@dataclass(frozen=True)
class Text:
    """A text in pieces.

    Attributes:
      name: what it is, for people.
      pieces: its articles.
    """

    name: str
    pieces: tuple[str, ...]


def help_topics() -> Text:
    """Return the articles that ``help()`` shows: the reference manual of the language, by topic.

    Raises:
      MachineError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MachineError(
            "this Python has no pydoc_data, which is the text here",
            hint="a Python with its full standard library has it",
        ) from None
    name = f"the topics of Python's help(), pydoc_data.topics of {platform.python_version()}"
    return Text(name, tuple(topics[name] for name in sorted(topics)))
