"""What mkdocs is told of pages that are read in the repository, too."""

from __future__ import annotations

import re
from typing import Any

_FENCE = re.compile(r"^(```[a-z]+)(?: [a-z]+)*?(?: as ([\w./]+)| [a-z]+)$", re.MULTILINE)
"""A fence with words for the tests beside its language, which Markdown would read as text."""

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")

_PIECE = re.compile(r"(<pre.*?</pre>|<[^>]+>)", re.DOTALL)
"""What is no text: preformatted text is left as it is, too."""

_CELL = re.compile(r"<td>(.*?)</td>", re.DOTALL)
_CODE = re.compile(r"<code>[^<]*</code>")
_OPTION = re.compile(r"(?<![\w-])--?[a-z]\w*")
_LONG_NAME = re.compile(r"[^\s<>]{14,}")
_JOINT = re.compile(r"(?<=[\w\]*])[._/,=:]+(?=[a-zA-Z])")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to files of the repository are their names: they are not in a site.

    Links to other pages stay, and are checked.  Fences keep their language, and the name of their
    file as a title.
    """
    return _OUTSIDE.sub(_name, _FENCE.sub(_fence, markdown))


def on_post_page(output: str, **_: Any) -> str:
    """Return a page that is read on narrow screens, too.

    Cells of sentences are marked, so that they are not the narrowest of their row.  Long names in
    cells may break at their joints, and no line ends with the hyphens of an option.
    """
    head, article, rest = re.split(r"(<article.*</article>)", output, flags=re.DOTALL)
    parts = _PIECE.split(_CELL.sub(_cell, article))
    parts[::2] = [_OPTION.sub(r'<span class="word">\g<0></span>', text) for text in parts[::2]]
    return head + "".join(parts) + rest


def _cell(cell: re.Match[str]) -> str:
    is_long = len(re.sub(r"<[^>]+>", "", cell[1])) > 100
    text = _CODE.sub(lambda code: _LONG_NAME.sub(_joints, code[0]), cell[1])
    return f"<td{' class=long' if is_long else ''}>{text}</td>"


def _joints(name: re.Match[str]) -> str:
    return _JOINT.sub(r"\g<0><wbr>", name[0])


def _fence(line: re.Match[str]) -> str:
    return f'{line[1]} title="{line[2]}"' if line[2] else line[1]


def _name(link: re.Match[str]) -> str:
    text, file = link[1], link[2]
    return text if file in text else f"{text} (`{file}`)"
