"""Faults of the index and of the folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from .place import DOWN, SHARDS, folder, index, index_text, names, other_file, sharded
from .rows import row
from .spoil import sparse_index

ROWS = [
    row(23, "an index without a total", 0, "", index(lambda i: i.pop("metadata"))),
    row(
        23,
        "an index with a wrong total",
        1,
        "another total size",
        index(lambda i: i["metadata"].update(total_size=7)),
    ),
    row(
        24,
        "an index that is no index",
        1,
        "too large|not JSON|appears twice|is not a string",
        sparse_index,
        index_text("{"),
        index_text('{"weight_map": {"a": 1, "a": 2}}'),
        index(lambda i: i["weight_map"].update({DOWN: 3})),
    ),
    row(
        25,
        "more than one set of weights",
        1,
        "more than one set|Mistral's own layout|only variants|shards that the index does not name",
        other_file(SHARDS[0], ""),
        names("consolidated.safetensors"),
        names("model.fp16.safetensors"),
        sharded(lambda p: p.save({"a": np.zeros(1, "f")}, "model-00003-of-00003.safetensors")),
    ),
    row(26, "pickles alone", 1, "moecc never opens pickles", names("pytorch_model.bin")),
    row(
        27,
        "no checkpoint there",
        1,
        "is empty|not a checkpoint|did you mean 'model'|on the hub",
        folder(lambda f: (shutil.rmtree(f), f.mkdir())),
        lambda p: (p.root / "x").write_text("hello") and p.open(p.root / "x"),
        lambda p: p.open(p.root / "modle"),
        lambda p: p.open(Path("HuggingFaceTB/SmolLM2-135M")),
    ),
    row(
        27,
        "a preset that is mistyped",
        2,
        "did you mean 'smollm2-135m'",
        lambda p: p.open("preset:smolm2-135m"),
    ),
]
