"""What mkdocs is told of pages that are read in the repository, too."""

from __future__ import annotations

import re
from typing import Any

_FENCE = re.compile(r"^(```[a-z]+)(?: [a-z]+)*?(?: as ([\w./]+)| [a-z]+)$", re.MULTILINE)
"""A fence with words for the tests beside its language, which Markdown would read as text."""

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to files of the repository are their names: they are not in a site.

    Links to other pages stay, and are checked.  Fences keep their language, and the name of their
    file as a title.
    """
    return _OUTSIDE.sub(_name, _FENCE.sub(_fence, markdown))


def _fence(line: re.Match[str]) -> str:
    return f'{line[1]} title="{line[2]}"' if line[2] else line[1]


def _name(link: re.Match[str]) -> str:
    text, file = link[1], link[2]
    return text if file in text else f"{text} (`{file}`)"
