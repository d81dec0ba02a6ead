"""Inputs that both checkouts read: golden checkpoints, and small models whose tokens are bytes."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

VOCABULARY = 384


def prepare(repository: Path, folder: Path) -> None:
    """Copy the golden checkpoints of `repository` and write the other inputs to `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    golden = folder / "golden"
    skipped = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(repository / "tests" / "golden", golden, ignore=skipped)
    for name in ("llama_gqa", "mixtral_gqa", "t5_relu_tied"):
        _extend_vocabulary(golden / name, folder / f"bytes-{name}")
    lines = [
        f"The {n}th line has {n * n} marks, and {n % 7} of them are red.\n" for n in range(900)
    ]
    (folder / "text.txt").write_text("".join(lines), "utf-8")
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps({"text": line.strip()}) + "\n" for line in lines[:200]), "utf-8"
    )
    pairs = [{"prompt": f"{n} plus {n % 9} is ", "completion": f"{n + n % 9}."} for n in range(300)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), "utf-8")


def golden_names(folder: Path) -> list[str]:
    """Return the names of the golden checkpoints in a folder of inputs."""
    return sorted(p.parent.name for p in (folder / "golden").glob("*/config.json"))


def has_experts(folder: Path, name: str) -> bool:
    """Return whether the config of a golden checkpoint names experts."""
    return "experts" in (folder / "golden" / name / "config.json").read_text("utf-8")


def _extend_vocabulary(source: Path, folder: Path) -> None:
    """Write `source` with a vocabulary of bytes, whose rows repeat, and a tokenizer."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text("utf-8"))
    size = config["vocab_size"]
    config["vocab_size"] = VOCABULARY
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = _read(source / "model.safetensors")
    for name, (dtype, shape, data) in tensors.items():
        if shape and shape[0] == size and math.prod(shape) > size:
            row = len(data) // size
            # Equal rows would give equal logits, so repeated rows are rotated.
            rows = [data[(i % size) * row : (i % size + 1) * row] for i in range(VOCABULARY)]
            turned = [r[4 * (i // size) :] + r[: 4 * (i // size)] for i, r in enumerate(rows)]
            tensors[name] = (dtype, [VOCABULARY, *shape[1:]], b"".join(turned))
    _write(folder / "model.safetensors", tensors)
    # The model of spans takes tokens of the tokenizer `bytes`, which has sentinels.
    if config["model_type"] != "t5":
        (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()), "utf-8")


def _read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            e["dtype"],
            e["shape"],
            raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
        )
        for name, e in header.items()
    }


def _write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _byte_tokenizer() -> dict[str, Any]:
    """Return a byte-level tokenizer without merges: a token is a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {characters[b]: b for b in range(256)},
            "merges": [],
        },
    }
