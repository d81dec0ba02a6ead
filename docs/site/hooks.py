"""What mkdocs is told of pages that are read in the repository, too."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to files of the repository are their names: they are not in a site.

    Links to other pages stay, and are checked.
    """
    return _OUTSIDE.sub(_name, markdown)


def _name(link: re.Match[str]) -> str:
    text, file = link[1], link[2]
    return text if file in text else f"{text} (`{file}`)"
