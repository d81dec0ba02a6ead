"""Faults of the process and its surroundings: disk, memory, locks, outputs."""

from __future__ import annotations

import shutil

from .place import UPCYCLE, Spoilt, failing, patched
from .rows import row
from .spoil import (
    fewer_descriptors,
    into_input,
    into_itself,
    locked_output,
    missing_extra,
    with_umask,
)

ROWS = [
    row(
        55,
        "a disk that is full before and in the middle",
        4,
        "disk is too small|No space left",
        patched("shutil.disk_usage", lambda p: shutil._ntuple_diskusage(9, 8, 1), Spoilt.convert),
        patched("os.pwrite", failing(OSError(28, "No space left on device")), Spoilt.convert),
    ),
    row(
        56,
        "an output that the system does not take",
        4,
        "Read-only|no right to write",
        patched("os.mkdir", failing(OSError(30, "Read-only file system")), Spoilt.convert),
        patched("os.access", lambda *a: False, Spoilt.convert),
    ),
    row(
        56, "a name that is too long", 1, "too long", lambda p: p.convert(out=p.root / ("a" * 300))
    ),
    row(
        57,
        "too little memory",
        4,
        "not enough memory",
        patched(
            "moecc.weights.evaluate.Evaluator.block",
            failing(MemoryError()),
            lambda p: p.main(
                "convert", p.model, p.root / "out", "-p", UPCYCLE, "--to", "mixtral", "--no-check"
            ),
        ),
    ),
    row(58, "fewer descriptors than shards", 0, "", fewer_descriptors),
    row(
        59,
        "two that write one output",
        1,
        "another conversion is writing this output",
        locked_output,
    ),
    row(
        63,
        "an output that is the input",
        1,
        "the output is (inside )?the input|not empty",
        into_itself,
        into_input,
    ),
    row(64, "files follow the umask", 0, "0o6[04]0", with_umask),
    row(66, "an extra that is not installed", 4, r"pip install '?(moecc|gguf)", missing_extra),
    row(
        68,
        "a name of the Hub that is none",
        2,
        "hf://ORG/NAME@REVISION",
        lambda p: p.open("hf://SmolLM2-135M"),
        lambda p: p.open("hf:HuggingFaceTB/SmolLM2-135M?revision=main"),
    ),
]
