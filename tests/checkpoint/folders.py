"""Folders of shards and files of JSON, and what is wrong with one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moecc.errors import InputError
from moecc.formats.open import open_checkpoint
from moecc.model.open import OpenedModel, open_model

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="the gguf package is not installed: moecc[gguf]"
)


def problems(path: object, read: Callable[[Any], object] = open_checkpoint) -> list[str]:
    """Return what reading a folder or file reports."""
    with pytest.raises(InputError) as caught:
        read(path)
    return [str(problem) for problem in caught.value.problems]


def problem(path: object) -> str:
    """Return the only problem that opening a folder or file reports."""
    [text] = problems(path)
    return text


def opened_model(path: str | Path) -> OpenedModel:
    """Open a model, or a golden one by its name."""
    return open_model(str(GOLDEN / path))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def index_of(weight_map: Mapping[str, str | None], total: object = None) -> dict[str, object]:
    """Return the index of a checkpoint in shards."""
    return {"metadata": {} if total is None else {"total_size": total}, "weight_map": weight_map}


def write_adapter(folder: Path, tensors: Mapping[str, Any], **settings: object) -> Path:
    """Write a LoRA adapter of rank 2 and scale 3 as PEFT does."""
    folder.mkdir()
    named = {f"base_model.model.{name}": np.asarray(a, "f") for name, a in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **settings}
    write_json(folder / "adapter_config.json", stated)
    return folder


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file from a header, a JSON value or bytes, and a buffer."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_tensors(path: Path, lengths: Mapping[str, int]) -> None:
    """Write f32 vectors of given lengths; element i of a tensor is i."""
    header, data = {}, b""
    for name, length in lengths.items():
        begin = len(data)
        data += struct.pack(f"<{length}f", *range(length))
        header[name] = {"dtype": "F32", "shape": [length], "data_offsets": [begin, len(data)]}
    write_raw(path, header, data)
