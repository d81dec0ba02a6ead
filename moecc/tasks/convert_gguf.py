"""Write a planned GGUF file: keys, tokenizer, tensors, and what stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moecc.tasks.conversion import Plan
from moecc.tasks.convert_records import WriteOptions, card, manifest, receipt_of
from moecc.version import __version__

if TYPE_CHECKING:
    from moecc.formats.gguf.encode import Key
    from moecc.formats.writer import WriteReport

_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
_ONE = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
_SEVERAL = {"language": "languages", "datasets": "datasets"}
"""The keys of a model card, one value or several, and the metadata that say the same."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k": 14, "bf16": 32}
"""llama.cpp's numbers for what most of a file is stored in."""


def is_file(planned: Plan, out: Path) -> bool:
    """Whether the output is the GGUF file itself, and not a folder with one."""
    from moecc.formats.gguf.storage import SUFFIX
    from moecc.translate.gguf import GgufExport

    return isinstance(planned.export, GgufExport) and out.suffix == SUFFIX


def write_gguf(folder: Path, planned: Plan, options: WriteOptions) -> WriteReport:
    """Write ``model.gguf`` into `folder`, with licences, receipt, card and manifest.

    Raises: as `moecc.tasks.convert.write`.
    """
    from moecc.formats.disk import write_durable
    from moecc.formats.files import read_whole
    from moecc.formats.gguf.storage import FILE_NAME
    from moecc.formats.manifest import MANIFEST_NAME
    from moecc.formats.modelcard import CARD_NAME
    from moecc.tasks.receipt import RECEIPT_NAME

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    written = _write_weights(folder, planned, options)
    for name, content in checkpoint.companions().items():
        if name.startswith(_LICENCES):
            data = read_whole(content) if isinstance(content, Path) else content
            write_durable(folder / name, data)
    receipt = receipt_of(planned, folder / FILE_NAME, options)
    words = ["--allow-nonfinite"] if options.allow_nonfinite else []
    write_durable(folder / RECEIPT_NAME, receipt.content())
    write_durable(folder / CARD_NAME, card(planned, receipt, words).encode())
    write_durable(
        folder / MANIFEST_NAME, manifest(folder, planned, written, options.source_files())
    )
    return written


def write_gguf_file(folder: Path, planned: Plan, options: WriteOptions) -> WriteReport:
    """Write ``model.gguf`` and its manifest into `folder`, from where they get their names.

    Raises: as `moecc.tasks.convert.write`.
    """
    from moecc.formats.disk import write_durable
    from moecc.formats.gguf.storage import FILE_NAME
    from moecc.formats.manifest import MANIFEST_NAME

    written = _write_weights(folder, planned, options)
    receipt = receipt_of(planned, folder / FILE_NAME, options).to_json()
    write_durable(
        folder / MANIFEST_NAME, manifest(folder, planned, written, options.source_files(), receipt)
    )
    return written


def _write_weights(folder: Path, planned: Plan, options: WriteOptions) -> WriteReport:
    from moecc.formats.gguf.encode import plan_file
    from moecc.formats.gguf.storage import FILE_NAME
    from moecc.formats.writer import write_files

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    tensors = planned.tensors
    file = plan_file(FILE_NAME, [t.entry for t in tensors], gguf_keys(planned))
    return write_files(
        folder, tensors, [file], checkpoint.read, progress=options.progress,
        allow_nonfinite=options.allow_nonfinite, journal=options.journal,
    )  # fmt: skip


def gguf_keys(planned: Plan) -> list[Key]:
    """Return all keys of the file: of the model, its origin and its tokenizer."""
    from moecc.formats.gguf.encode import Key
    from moecc.translate.gguf import GgufExport

    export, checkpoint = planned.export, planned.model.checkpoint
    assert isinstance(export, GgufExport), "a plan of a GGUF file"
    assert checkpoint is not None, "a plan has weights"
    kept = checkpoint.card()
    return [
        Key("general.architecture", export.architecture),
        Key("general.type", "model"),
        *(Key(f"general.{name}", kept[key][0]) for key, name in _ONE.items() if key in kept),
        *(Key(f"general.{name}", kept[key]) for key, name in _SEVERAL.items() if key in kept),
        Key("general.file_type", _file_type(planned)),
        Key("general.quantization_version", 2),
        Key("moecc.version", __version__),
        Key("moecc.pipeline", planned.pipeline.in_full()),
        *export.keys,
        *export.tokenizer,
    ]


def _file_type(planned: Plan) -> int:
    sizes: dict[str, int] = {}
    for entry in (t.entry for t in planned.tensors):
        name = entry.storage.name.lower() if entry.storage else entry.dtype.name
        sizes[name] = sizes.get(name, 0) + entry.nbytes
    return _FILE_TYPES[max(sizes, key=lambda name: sizes[name])]
