"""Two texts that machines have already: the sources of Python's library, what Debian documents.

Paragraphs that occurred before are left out, in whatever document: licences repeat each other.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moecc.errors import MachineError

LONGEST, SHORTEST = 40_000, 400
"""Characters of a document: what is longer is cut, what is shorter is left out."""

HELD_OUT_LONGEST = 2_000
"""Characters of a held-out document, so that many documents are read in little time."""

HELD_OUT_EVERY = 16
MOST = 16_000_000
DEBIAN = ("copyright", "changelog.gz", "changelog.Debian.gz", "NEWS.gz", "README.gz")


def _python() -> Iterator[tuple[str, bytes]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if "-packages/" not in name:
            yield name, path.read_bytes()


def _debian() -> Iterator[tuple[str, bytes]]:
    documents = Path("/usr/share/doc")
    for path in documents.rglob("*"):
        if path.name in DEBIAN and path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            name = path.relative_to(documents).as_posix()
            yield name, gzip.decompress(content) if path.suffix == ".gz" else content


TEXTS = {"python": _python, "debian": _debian}


def write_text(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a text as JSON lines, and return the files to train on and that are held out.

    The order is that of hashes of names, so that no package is together.

    Raises:
      MachineError: this machine has less than 10 MB of it.
    """
    files = sorted(TEXTS[name](), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.jsonl", folder / "heldout.jsonl"
    characters = number = 0
    seen: set[bytes] = set()
    with train.open("w", encoding="utf-8") as to_train, held_out.open("w", encoding="utf-8") as out:
        for _, content in files:
            text = _unseen(content.decode("utf-8", "replace"), seen)[:LONGEST]
            if len(text) < SHORTEST or characters > MOST:
                continue
            is_held_out = number % HELD_OUT_EVERY == 0
            line = json.dumps({"text": text[:HELD_OUT_LONGEST] if is_held_out else text})
            print(line, file=out if is_held_out else to_train)
            characters, number = characters + len(text), number + 1
    if characters < 10_000_000:
        raise MachineError(
            f"there is too little text of {name}",
            expected="10 million characters",
            found=f"{characters:,}",
        )
    return train, held_out


def _unseen(text: str, seen: set[bytes]) -> str:
    """Return the paragraphs of `text` that are not in `seen`, and add them to it."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs).strip()
