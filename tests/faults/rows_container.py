"""Faults of the container: headers, tensors, files."""

from __future__ import annotations

import os
import shutil

from .place import (
    ONE,
    Spoilt,
    failing,
    folder,
    patched,
    reader,
)
from .rows import row
from .spoil import aside_and_linked, by_template, flipped, of_every_type

ROWS = [
    row(12, "element types that are read, bit by bit", 0, "", of_every_type),
    row(14, "a boolean that is 2", 1, "bytes other than 0 and 1", by_template("BOOL")),
    row(
        16,
        "a file that changes while it is read",
        1,
        "changed while|ends in the middle",
        reader(lambda c, p: os.truncate(p.model / ONE, 100)),
        reader(lambda c, p: os.replace(shutil.copy(p.model / ONE, p.root / "x"), p.model / ONE)),
    ),
    row(17, "a flipped bit in the data", 3, "differ from what moecc wrote", flipped),
    row(
        18,
        "what is no regular file of the folder",
        1,
        "not a regular file|leaves its folder",
        folder(lambda f: ((f / ONE).unlink(), (f / ONE).mkdir())),
        folder(lambda f: ((f / ONE).unlink(), os.mkfifo(f / ONE))),
        folder(lambda f: ((f / ONE).unlink(), (f / ONE).symlink_to("/dev/zero"))),
        folder(aside_and_linked),
    ),
    row(
        19,
        "a file that the system does not read",
        4,
        "cannot read the file",
        patched("os.preadv", failing(OSError(5, "Input/output error")), Spoilt.open),
        patched("os.open", failing(PermissionError(13, "Permission denied")), Spoilt.open),
    ),
]
