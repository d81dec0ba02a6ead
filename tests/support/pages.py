"""What a parser of HTML finds in a page: elements with attributes, texts, figures, scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any


class Parsed(HTMLParser):
    """A page as a parser reads it.

    Attributes:
      elements: tags with their attributes, ends of elements as ``/tag``, in order.
      texts: texts in the same order, scripts excepted.
      figures: what is drawn, as JSON values.
      scripts: the programs.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.scripts: list[str] = []
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("type") or "program"

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", ()))
        self._script = None

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", ((data, None),)))

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.texts.append(data)
        elif self._script == "application/json":
            self.figures.append(json.loads(data))
        else:
            self.scripts.append(data)

    @property
    def policy(self) -> dict[str, list[str]]:
        """The content-security policy: the sources by directive."""
        (content,) = (
            attrs[1][1] or ""
            for tag, attrs in self.elements
            if tag == "meta" and attrs[0] == ("http-equiv", "Content-Security-Policy")
        )
        directives = (directive.split() for directive in content.split(";"))
        return {name: sources for name, *sources in directives}


def script_hash(script: str) -> str:
    """Return the source by which a policy permits a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def with_probe(page: str, script: str) -> str:
    """Return a page that runs one more script, which its policy permits."""
    page, count = re.subn(
        "script-src (?:&#39;none&#39;)?", f"script-src {script_hash(script)} ", page, count=1
    )
    assert count == 1, "every page has a policy"
    return page.replace("</body>", f"<script>{script}</script></body>")
