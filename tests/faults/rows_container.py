"""Faults of the container: headers, tensors, files."""

from __future__ import annotations

import os
import re
import shutil

from .place import (
    DOWN,
    ONE,
    Spoilt,
    entry,
    failing,
    folder,
    framed,
    header,
    header_text,
    named,
    patched,
    reader,
    weights,
)
from .rows import row
from .spoil import aside_and_linked, by_template, flipped, of_every_type, overlapping, twice

ROWS = [
    row(
        1,
        "a file of 0 or 7 bytes",
        1,
        r"too small to have a header[^~]*found: [07] bytes",
        weights(b""),
        weights(b"\1" * 7),
    ),
    row(
        2,
        "a header length that cannot be",
        1,
        "the header is (too long|longer than the file)",
        *(weights(framed(b"{}", length=n)) for n in (2**63, 10**8 + 1, 10**6)),
    ),
    row(
        3,
        "a header that is not plain JSON text",
        1,
        "not UTF-8|not a JSON object|not JSON",
        *(weights(framed(h)) for h in (b'{"\xff":1}', b"\xef\xbb\xbf{}", b"{}\0\0", b" {}")),
    ),
    row(
        4,
        "a header that is no object, too deep or too long",
        1,
        "not a JSON object|not JSON|nested more than|lists too many tensors",
        *(
            weights(framed(h))
            for h in (b"[]", b"{}x", b'{"a":' * 100_000, b"{" + b'"data_offsets"' * (1 << 19))
        ),
    ),
    row(
        5,
        "a tensor twice",
        1,
        f"the key '{DOWN}' appears twice",
        header_text(lambda t: twice(t, DOWN)),
    ),
    row(
        6,
        "a key twice inside an entry",
        1,
        "the key '(dtype|format)' appears twice",
        header_text(lambda t: re.sub('"dtype"', '"dtype": "F32", "dtype"', t, count=1)),
        header_text(lambda t: re.sub('"format"', '"format": "x", "format"', t, count=1)),
    ),
    row(
        7,
        "data that overlap, leave a hole, or trail",
        1,
        "overlap|a hole between|belong to no",
        header(overlapping),
        header(lambda h, d: h.pop(DOWN)),
        header(lambda h, d: d.extend(b"x")),
    ),
    row(
        8,
        "a file that is cut short",
        1,
        r"cut short[^~]*expected: a file of[^~]*fetch the file",
        header(lambda h, d: d.__delitem__(slice(-9, None))),
    ),
    row(
        9,
        "a shape of another size than the data",
        1,
        "contradict each other|too many elements",
        *(entry(shape=s) for s in ([16, 23], [2**62, 2**62], [0, 2**62, 2**62])),
    ),
    row(
        10,
        "sizes and offsets that are no sizes",
        1,
        "not usable|not finite",
        *(entry(shape=[v, 2]) for v in (-1, 1.5, True, "3")),
        entry(data_offsets=[0, 1.0]),
        header_text(lambda t: t.replace("16", "1e400", 1)),
    ),
    row(
        11,
        "an element type that is not read",
        1,
        r"F64, F32, F16, BF16[^~]*(F6_X|F4|F8_E8M0)",
        entry(dtype="F6_X"),
        entry(dtype="F4"),
        entry(dtype="F8_E8M0"),
    ),
    row(12, "element types that are read, bit by bit", 0, "", of_every_type),
    row(
        13,
        "a hostile name of a tensor",
        1,
        "name is empty|65,536 characters|control or invisible|no such tensor|is not a string",
        *(named(n) for n in ("", "a" * 65536, "\x1b[31m", "\u202ex", "../..", "__metadata__")),
    ),
    row(14, "a boolean that is 2", 1, "bytes other than 0 and 1", by_template("BOOL")),
    row(
        15,
        "another kind of file",
        1,
        "a Python pickle|a zip|an HDF5|an HTML page|a Git LFS",
        *(
            weights(b)
            for b in (
                b"\x80\x02}q\0.",
                b"PK\3\4" + bytes(40),
                b"\x89HDF\r\n\x1a\n" + bytes(20),
                b"<!DOCTYPE html><html>404",
                b"version https://git-lfs.github.com/spec/v1\noid",
            )
        ),
    ),
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
