"""GGUF files built by hand, byte by byte, so that each can be wrong in one place."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from moecc.formats.gguf.storage import STORAGES

SCALARS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "B"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
CODES = {s.name: (s.code, s.block, s.block_bytes) for s in STORAGES.values()}
CODES["Q8_K"] = (15, 256, 292)


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


class GgufBuilder:
    """Collects keys and tensors; `build` puts the bytes together."""

    def __init__(self):
        self.keys: list[bytes] = []
        self.infos: list[bytes] = []
        self.data = b""
        self.alignment = 32

    def key(self, name, kind, value):
        if kind == "string":
            return self.raw_key(name, 8, text(value))
        code, letter = SCALARS[kind]
        return self.raw_key(name, code, struct.pack(f"<{letter}", value))

    def array(self, name, kind, values):
        if kind == "string":
            code, body = 8, b"".join(map(text, values))
        else:
            code, letter = SCALARS[kind]
            body = struct.pack(f"<{len(values)}{letter}", *values)
        return self.raw_key(name, 9, struct.pack("<IQ", code, len(values)) + body)

    def raw_key(self, name, code, body):
        self.keys.append(text(name) + struct.pack("<I", code) + body)
        return self

    def drop(self, name):
        self.keys = [key for key in self.keys if not key.startswith(text(name))]
        return self

    def tensor(self, name, shape, kind="F32", data=None, *, offset=None):
        """Add a tensor; `shape` is outermost first, zeros where no data is given."""
        code, block, block_bytes = CODES[kind] if isinstance(kind, str) else (kind, 1, 4)
        if data is None:
            data = bytes(int(np.prod(shape)) // block * block_bytes)
        self.data += bytes(-len(self.data) % self.alignment)
        place = len(self.data) if offset is None else offset
        self.data += data
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        info = struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", code, place)
        self.infos.append(text(name) + info)
        return self

    def build(self, *, version=3, tensor_count=None, key_count=None):
        counts = (
            len(self.infos) if tensor_count is None else tensor_count,
            len(self.keys) if key_count is None else key_count,
        )
        head = b"GGUF" + struct.pack("<IQQ", version, *counts)
        head += b"".join(self.keys) + b"".join(self.infos)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, path, **counts):
        path.write_bytes(self.build(**counts))
        return path


def add_model(
    builder,
    architecture="llama",
    *,
    layers=2,
    heads=4,
    groups=2,
    head_dim=8,
    hidden=32,
    mlp=64,
    vocab=48,
    kind="F32",
    tied=True,
    biases=(),
    make=None,
):
    """Add the keys and tensors of a small decoder; `make` gives the bytes of a matrix or bias."""
    builder.key("general.architecture", "string", architecture)
    sizes = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": hidden,
        "feed_forward_length": mlp,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    for name, size in sizes.items():
        builder.key(f"{architecture}.{name}", "u32", size)
    builder.key(f"{architecture}.attention.layer_norm_rms_epsilon", "f32", 1e-5)
    builder.key(f"{architecture}.rope.freq_base", "f32", 100_000.0)

    def add(name, shape, storage):
        builder.tensor(name, shape, storage, make(name, shape) if make else None)

    wide, narrow = heads * head_dim, groups * head_dim
    matrices = {
        "attn_q": (wide, hidden),
        "attn_k": (narrow, hidden),
        "attn_v": (narrow, hidden),
        "attn_output": (hidden, wide),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    add("token_embd.weight", (vocab, hidden), kind)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            builder.tensor(f"blk.{layer}.{norm}.weight", (hidden,))
        if architecture == "qwen3":
            for norm in ("attn_q_norm", "attn_k_norm"):
                builder.tensor(f"blk.{layer}.{norm}.weight", (head_dim,))
        for stem, shape in matrices.items():
            add(f"blk.{layer}.{stem}.weight", shape, kind)
            if stem in biases:
                add(f"blk.{layer}.{stem}.bias", shape[:1], "F32")
    builder.tensor("output_norm.weight", (hidden,))
    if not tied:
        add("output.weight", (vocab, hidden), kind)
    return builder


@pytest.fixture
def builder():
    """An empty file."""
    return GgufBuilder()


@pytest.fixture
def small_model():
    """Return a builder with a small model; options as in `add_model`."""
    return lambda *args, **options: add_model(GgufBuilder(), *args, **options)
