"""A tiny model in a folder, and functions that spoil it in one way each, then open it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ..checkpoint.gguf.conftest import GgufBuilder, add_model  # noqa: TID252

GOLDEN = Path(__file__).parent.parent / "golden"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DOWN = "model.layers.0.mlp.down_proj.weight"
UPCYCLE = "upcycle{experts=2 top-k=2}"

Act = Callable[["Spoilt"], object]


class Spoilt:
    """A folder for one case.

    Attributes:
      root: the folder.
      model: a llama of one layer, whole and valid until a case spoils it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.model = root / "model"

    # --- what a case does in the end

    def open(self, source: Path | None = None):
        """Open a model and import its graph, from headers alone."""
        from moecc.model.open import open_model

        with open_model(str(source or self.model)):
            pass

    def convert(self, pipeline: str = UPCYCLE, **more) -> Path:
        """Plan a conversion to Mixtral, and write it."""
        from moecc.formats.writer import MAX_SHARD_BYTES, WriteOptions
        from moecc.jobs.convert import check_place, plan, write
        from moecc.model.open import open_model
        from moecc.rewrite.pipeline import Pipeline

        target, dtype = more.pop("to", "mixtral"), more.pop("dtype", None)
        out = Path(more.pop("out", self.root / "out"))
        with open_model(str(more.pop("source", self.model))) as model:
            planned = plan(model, Pipeline.parse(pipeline), target, dtype=dtype, check=False)
            check_place(planned, out, force=more.get("force", False))
            options = WriteOptions(max_shard_bytes=more.pop("max_shard_bytes", MAX_SHARD_BYTES))
            write(planned, out, options, **more)
        return out

    def main(self, *args: object):
        """Run a command."""
        from moecc.cli.main import main

        raise SystemExit(main([str(a) for a in args]))

    # --- parts of the model

    def tensors(self) -> dict[str, np.ndarray]:
        return dict(load_file(self.model / ONE))

    def save(self, tensors: Mapping[str, np.ndarray], name: str = ONE):
        save_file(dict(tensors), self.model / name, metadata={"format": "pt"})

    def config(self) -> dict[str, Any]:
        return json.loads((self.model / "config.json").read_text())

    def shard(self) -> dict[str, Any]:
        """Split the weights into two shards, and return their index."""
        tensors = self.tensors()
        names = sorted(tensors)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        for shard, half in zip(SHARDS, halves, strict=True):
            self.save({n: tensors[n] for n in half}, shard)
        (self.model / ONE).unlink()
        where = {n: s for s, half in zip(SHARDS, halves, strict=True) for n in half}
        size = sum(t.nbytes for t in tensors.values())
        return {"metadata": {"total_size": size}, "weight_map": where}


def make_model(folder: Path):
    """Write a llama of one layer, cut from a golden one."""
    golden = GOLDEN / "llama_gqa"
    folder.mkdir()
    config = json.loads((golden / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors = load_file(golden / ONE)
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, folder / ONE, metadata={"format": "pt"})


# --- each returns a case


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def opening(edit: Callable[[Spoilt], object]) -> Act:
    """Edit the folder, then open the model."""
    return lambda place: (edit(place), place.open())


def _edited(place: Spoilt, edit: Callable[[dict[str, np.ndarray]], object]):
    arrays = place.tensors()
    edit(arrays)
    place.save(arrays)


def tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Act:
    """Edit the tensors, then open the model."""
    return opening(lambda place: _edited(place, edit))


def converting(edit: Callable[[dict[str, np.ndarray]], object]) -> Act:
    """Edit the tensors, then convert the model."""
    return lambda place: (_edited(place, edit), place.convert())


def names(*created: str) -> Act:
    """Leave nothing but config.json and files of these names."""

    def edit(place):
        (place.model / ONE).unlink()
        for name in created:
            (place.model / name).write_bytes(b"{}")

    return opening(edit)


def gguf(make: Callable[[GgufBuilder], object], **counts: int) -> Act:
    """Write a GGUF file of a small model, which `make` adds to."""

    def act(place):
        builder = add_model(GgufBuilder(), layers=1, heads=2, groups=1, hidden=16, mlp=32, vocab=6)
        make(builder)
        place.open(builder.write(place.root / "model.gguf", **counts))

    return act


def recipe(text: str | bytes) -> Act:
    """Read a recipe."""

    def act(place):
        from moecc.train.recipe_text import load_recipe

        path = place.root / "r.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        load_recipe(str(path))

    return act


def reader(edit: Callable[[Spoilt], object]) -> Act:
    """Open the folder, do something to it, then read a tensor."""

    def act(place):
        from moecc.formats.folder import open_folder

        with open_folder(place.model) as opened:
            edit(place)
            opened.read(DOWN)

    return act


def patched(target: str, value: object, then: Act) -> Act:
    """Do something while a function is replaced."""

    def act(place):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, value)
            then(place)

    return act


def failing(error: BaseException) -> Callable[..., Any]:
    """Return a function that always raises this error."""

    def fail(*args, **more):
        raise error

    return fail


class Allowed(Exception):
    """A case that is no error, and what moecc says of it."""


def advised(text: str) -> Act:
    """Say what a pipeline warns of."""

    def act(place):
        from moecc.rewrite.pipeline import Pipeline

        raise Allowed("\n".join(str(problem) for problem in Pipeline.parse(text).warnings()))

    return act
