"""Faults of other formats: GGUF, Orbax, T5X, msgpack."""

from __future__ import annotations

from .place import gguf, names
from .rows import row

ROWS = [
    row(
        47,
        "one part of a split GGUF file",
        1,
        r"one of 3 parts[^~]*--merge",
        gguf(lambda b: b.key("split.count", "u16", 3)),
    ),
    row(
        49,
        "a folder of Orbax",
        1,
        "an Orbax checkpoint|not the metadata of a tree",
        names("0.orbax-checkpoint-tmp/x"),
        names("_METADATA", "d/x"),
        names("manifest.ocdbt"),
        names("_CHECKPOINT_METADATA"),
    ),
    row(
        51,
        "a folder of T5X whose spec is none",
        1,
        "not a msgpack file of T5X",
        names("checkpoint", "target.encoder.wi/.zarray"),
    ),
    row(52, "a file of msgpack", 1, r"flax_model\.msgpack", names("flax_model.msgpack")),
]
