"""A folder of statistics: tensors in one safetensors file, and of what they are.

``capture.json`` says of which model and texts; a method refuses the statistics of another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.numpy import save

from moecc.checkpoint.durable import write_durable
from moecc.checkpoint.folder import SafetensorsFolder, open_folder
from moecc.checkpoint.jsonfile import read_json_object
from moecc.checkpoint.manifest import file_digest
from moecc.checkpoint.problems import Problems, describe
from moecc.checkpoint.source import Checkpoint
from moecc.errors import InputError
from moecc.support.untyped import JsonDict
from moecc.types.arrays import Array

FACTS, TENSORS = "capture.json", "model.safetensors"
SCHEMA = "moecc.capture/1"


@dataclass(frozen=True)
class CaptureFacts:
    """Of what statistics are.

    Attributes:
      model: the fingerprint of the model; see `fingerprint`.
      texts: the digests of the tokens of each text, by the names of the texts.
      tokens: how many tokens were read.
      sequence: the tokens of a sequence.
      active: the share of the neurons of a token that count as active.
      digest: of the file of tensors.
    """

    model: str
    texts: Mapping[str, str]
    tokens: int
    sequence: int
    active: float
    digest: str = ""


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return what tells a model from another: names, shapes, and the first row of each tensor."""
    found = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        found.update(f"{name} {info.dtype.name}{list(info.shape)}\0".encode())
        values = checkpoint.read(name, 0, min(1, info.shape[0])) if info.shape else (
            checkpoint.read(name))  # fmt: skip
        found.update(values.tobytes())
    return found.hexdigest()


def write_capture(folder: Path, facts: CaptureFacts, tensors: Mapping[str, Array]) -> CaptureFacts:
    """Write statistics into an empty folder; return their facts with the digest.

    Raises:
      MachineError: the disk is full.
    """
    write_durable(folder / TENSORS, save(dict(tensors), {"format": SCHEMA}))
    known = asdict(facts) | {"digest": file_digest(folder / TENSORS)}
    text = json.dumps({"schema": SCHEMA, **known}, indent=2, ensure_ascii=False) + "\n"
    write_durable(folder / FACTS, text.encode())
    return CaptureFacts(**known)


def open_capture(path: Path) -> tuple[SafetensorsFolder, CaptureFacts]:
    """Open statistics; no tensor is read, but for its digest.

    Raises:
      InputError: the folder has none, or they were changed.
    """
    if not (path / FACTS).is_file():
        raise InputError(
            "not a folder of statistics", where=str(path), expected=f"{FACTS} and {TENSORS}",
            hint="moecc capture MODEL --text FILE --out DIR writes one",
        )  # fmt: skip
    facts = _facts(read_json_object(path / FACTS, limit_bytes=1 << 20), str(path / FACTS))
    tensors = open_folder(path, needs_config=False)
    found = file_digest(path / TENSORS)
    if found != facts.digest:
        tensors.close()
        raise InputError(
            "the statistics were changed after they were written", where=str(path / TENSORS),
            expected=facts.digest, found=found,
        )  # fmt: skip
    return tensors, facts


def _facts(data: JsonDict, where: str) -> CaptureFacts:
    if data.get("schema") != SCHEMA:
        raise InputError(
            "not statistics that this version reads", where=where, expected=SCHEMA,
            found=describe(data.get("schema")), hint="moecc capture takes them anew",
        )  # fmt: skip
    problems = Problems()
    kinds = {"model": str, "texts": dict, "tokens": int, "sequence": int, "digest": str}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            problems.add("a value of another type", where=f"{where}: {key}",
                         expected=kind.__name__, found=describe(data.get(key)))  # fmt: skip
    active = data.get("active")
    if not isinstance(active, float):
        problems.add("a value of another type", where=f"{where}: active", expected="a share",
                     found=describe(active))  # fmt: skip
    problems.raise_if_any()
    return CaptureFacts(**{key: value for key, value in data.items() if key != "schema"})
