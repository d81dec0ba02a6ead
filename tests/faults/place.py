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

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model"

    # --- what a case does in the end

    def open(self, source: Path | None = None) -> None:
        """Open a model and import its graph, from headers alone."""
        from moecc.model.open import open_model

        with open_model(str(source or self.model)):
            pass

    def convert(self, pipeline: str = UPCYCLE, **more: Any) -> Path:
        """Plan a conversion to Mixtral, and write it."""
        from moecc.jobs.convert import check_place, plan, write
        from moecc.model.open import open_model
        from moecc.rewrite.pipeline import Pipeline

        target, dtype = more.pop("to", "mixtral"), more.pop("dtype", None)
        out = Path(more.pop("out", self.root / "out"))
        with open_model(str(more.pop("source", self.model))) as model:
            planned = plan(model, Pipeline.parse(pipeline), target, dtype=dtype, check=False)
            check_place(planned, out, force=more.get("force", False))
            write(planned, out, **more)
        return out

    def main(self, *args: object) -> None:
        """Run a command."""
        from moecc.cli.main import main

        raise SystemExit(main([str(a) for a in args]))

    # --- parts of the model

    def tensors(self) -> dict[str, np.ndarray]:
        return dict(load_file(self.model / ONE))

    def save(self, tensors: Mapping[str, np.ndarray], name: str = ONE) -> None:
        save_file(dict(tensors), self.model / name, metadata={"format": "pt"})

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.model / "config.json").read_text())
        return found

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


def make_model(folder: Path) -> None:
    """Write a llama of one layer, cut from a golden one."""
    golden = GOLDEN / "llama_gqa"
    folder.mkdir()
    config = json.loads((golden / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors = load_file(golden / ONE)
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, folder / ONE, metadata={"format": "pt"})


# --- each returns a case: spoil, then open


def weights(content: bytes) -> Act:
    """Put other bytes in the place of the weights."""

    def act(place: Spoilt) -> None:
        (place.model / ONE).write_bytes(content)
        place.open()

    return act


def header(edit: Callable[[dict[str, Any], bytearray], object]) -> Act:
    """Edit the header as a JSON object, and the data after it."""

    def act(place: Spoilt) -> None:
        path = place.model / ONE
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        entries, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
        edit(entries, data)
        path.write_bytes(framed(json.dumps(entries).encode(), bytes(data)))
        place.open()

    return act


def entry(**changes: Any) -> Act:
    """Change fields of the entry of one tensor."""
    return header(lambda entries, data: entries[DOWN].update(changes))


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def config(**changes: Any) -> Act:
    """Change keys of config.json; None removes one."""

    def act(place: Spoilt) -> None:
        found = {**place.config(), **changes}
        text = json.dumps({k: v for k, v in found.items() if v is not None})
        (place.model / "config.json").write_text(text)
        place.open()

    return act


def other_file(name: str, content: str | bytes) -> Act:
    """Write a file into the folder of the model."""

    def act(place: Spoilt) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (place.model / name).write_bytes(data)
        place.open()

    return act


def tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Act:
    """Edit the tensors, then open the model."""

    def act(place: Spoilt) -> None:
        found = place.tensors()
        edit(found)
        place.save(found)
        place.open()

    return act


def tensors_converted(edit: Callable[[dict[str, np.ndarray]], object], **more: Any) -> Act:
    """Edit the tensors, then convert the model."""

    def act(place: Spoilt) -> None:
        found = place.tensors()
        edit(found)
        place.save(found)
        place.convert(**more)

    return act


def index(edit: Callable[[dict[str, Any]], object]) -> Act:
    """Split the weights, and edit the index."""

    def act(place: Spoilt) -> None:
        found = place.shard()
        edit(found)
        (place.model / INDEX).write_text(json.dumps(found))
        place.open()

    return act


def index_text(text: str) -> Act:
    """Split the weights, and write another text as the index."""

    def act(place: Spoilt) -> None:
        place.shard()
        (place.model / INDEX).write_text(text)
        place.open()

    return act


def sharded(edit: Callable[[Spoilt], object]) -> Act:
    """Split the weights, and edit the folder."""

    def act(place: Spoilt) -> None:
        (place.model / INDEX).write_text(json.dumps(place.shard()))
        edit(place)
        place.open()

    return act


def folder(edit: Callable[[Path], object]) -> Act:
    """Edit the folder of the model, then open it."""

    def act(place: Spoilt) -> None:
        edit(place.model)
        place.open()

    return act


def names(*created: str) -> Act:
    """Leave nothing but config.json and files of these names."""

    def act(place: Spoilt) -> None:
        (place.model / ONE).unlink()
        for name in created:
            path = place.model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"{}")
        place.open()

    return act


def gguf(make: Callable[[GgufBuilder], object], **counts: int) -> Act:
    """Write a GGUF file of a small model, which `make` adds to."""

    def act(place: Spoilt) -> None:
        builder = add_model(GgufBuilder(), layers=1, heads=2, groups=1, hidden=16, mlp=32, vocab=6)
        make(builder)
        place.open(builder.write(place.root / "model.gguf", **counts))

    return act


def pipeline(text: str, **more: Any) -> Act:
    """Convert by this pipeline."""
    return lambda place: place.convert(text, **more)


def recipe(text: str | bytes) -> Act:
    """Read a recipe."""

    def act(place: Spoilt) -> None:
        from moecc.train.recipe_text import load_recipe

        path = place.root / "r.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        load_recipe(str(path))

    return act


def reader(edit: Callable[[Any, Spoilt], object]) -> Act:
    """Open the folder, do something to it, then read a tensor."""

    def act(place: Spoilt) -> None:
        from moecc.formats.folder import open_folder

        with open_folder(place.model) as opened:
            edit(opened, place)
            opened.read(DOWN)

    return act


def patched(target: str, value: object, then: Act) -> Act:
    """Do something while a function is replaced."""

    def act(place: Spoilt) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, value)
            then(place)

    return act


def failing(error: BaseException) -> Callable[..., Any]:
    """Return a function that always raises this error."""

    def fail(*args: object, **more: object) -> Any:
        raise error

    return fail


def said(find: Callable[[Spoilt], list[str]]) -> Act:
    """Raise what is said about a case that is allowed: exit code 0, and these lines."""

    def act(place: Spoilt) -> None:
        raise Allowed("\n".join(find(place)))

    return act


class Allowed(Exception):
    """A case that is no error, and what moecc says of it."""


def warned(name: str, document: object) -> Act:
    """Write a JSON file beside the weights, and say what the model warns of."""

    def find(place: Spoilt) -> list[str]:
        from moecc.model.open import open_model

        (place.model / name).write_text(json.dumps(document))
        with open_model(str(place.model)) as model:
            return model.warnings

    return said(find)


def advised(text: str) -> Act:
    """Say what a pipeline warns of."""

    def find(place: Spoilt) -> list[str]:
        from moecc.rewrite.pipeline import Pipeline

        return [str(problem) for problem in Pipeline.parse(text).warnings()]

    return said(find)
