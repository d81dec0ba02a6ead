"""Faults of other formats: GGUF, Orbax, T5X, msgpack."""

from __future__ import annotations

from .place import gguf, names
from .rows import row
from .spoil import bad_dimensions, tensor_entry

ROWS = [
    row(
        46,
        "a GGUF file that claims what it has not",
        1,
        "ends in the middle|too many (metadata keys|tensors)|wrong number of axes"
        "|shape is not usable"
        "|unknown type of a value|beyond the end of the file|overlap|two tensors have this name"
        "|the key appears twice|alignment of the data is not usable|arrays of arrays|not UTF-8"
        "|version of GGUF is not read|is big-endian",
        gguf(
            lambda b: b.raw_key("x", 9, (4).to_bytes(4, "little") + (2**63).to_bytes(8, "little"))
        ),
        gguf(lambda b: b.raw_key("x", 8, (2**63).to_bytes(8, "little"))),
        gguf(lambda b: None, key_count=2**63),
        gguf(lambda b: None, tensor_count=2**63),
        gguf(bad_dimensions),
        gguf(lambda b: tensor_entry(b, (2**62, 2**62))),
        gguf(lambda b: b.raw_key("x", 99, b"")),
        gguf(lambda b: b.tensor("x", (4,), offset=2**40)),
        gguf(lambda b: b.tensor("x", (4,), offset=0)),
        gguf(lambda b: b.tensor("output_norm.weight", (16,))),
        gguf(lambda b: b.key("general.architecture", "string", "llama")),
        *(gguf(lambda b, a=a: b.key("general.alignment", "u32", a)) for a in (0, 3, 2**30)),
        gguf(lambda b: b.raw_key("x", 9, b"\x09\0\0\0\1\0\0\0\0\0\0\0" * 2000)),
        gguf(lambda b: b.key(b"\xff", "u32", 1)),
        *(gguf(lambda b: None, version=v) for v in (1, 99, 3 << 24)),
    ),
    row(
        47,
        "one part of a split GGUF file",
        1,
        r"one of 3 parts[^~]*--merge",
        gguf(lambda b: b.key("split.count", "u16", 3)),
    ),
    row(
        48,
        "blocks that are not read, or not whole",
        1,
        "storage type[^~]*Q8_K|not whole blocks",
        gguf(lambda b: b.tensor("x", (4, 256), 15)),
        gguf(lambda b: b.tensor("x", (4, 33), "Q8_0", bytes(200))),
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
