"""Folders of transformers converted as modules of PyTorch: ``moecc convert --via torch``.

Blocks are found on the device ``meta``, so that all of a conversion is checked before a weight is
read.  The dense model is then loaded by transformers, and the result is streamed tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moecc.api.arguments import flag, folder_text, whole
from moecc.errors import InputError, MoeccError, Problem, raise_problems
from moecc.formats.files import make_folder, read_json_object, read_whole, write_durable
from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES, SafetensorsFolder, open_folder
from moecc.formats.manifest import conversion_of, hashed_beside
from moecc.formats.output import check_output, output_folder
from moecc.formats.run import GRAPH as GRAPH_NAME
from moecc.formats.writer import (
    DEFAULTS,
    OutputTensor,
    WriteOptions,
    WriteReport,
    write_checkpoint,
)
from moecc.ir.text import print_graph
from moecc.jobs.receipt import load_receipt, object_of
from moecc.prove import Prover
from moecc.prove.conversion import ConversionProof
from moecc.types import Array, DType
from moecc.version import __version__
from moecc_backends.jaxpr.scopes import leaves_of
from moecc_backends.jaxpr.storage import rows_of
from moecc_backends.jaxpr.views import shape_of
from moecc_backends.torch_export.conversion import (
    ModuleConversion,
    array_of,
    convert_surveyed,
    graph_over,
    tensor_of,
    write_beside,
    write_config,
)
from moecc_backends.torch_export.exporting import error_text, exported_module
from moecc_backends.torch_export.surveying import SurveyedModel, numpy_dtype, survey_model

BATCH, TOKENS, TOKEN_ID = 2, 7, 3
"""The sizes of the inputs that a model is traced with, and the token that they repeat."""


@contextmanager
def _by_transformers(folder: Path, action: str) -> Iterator[None]:
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except MoeccError:
        raise
    except Exception as error:  # its exceptions are of many types, and of other libraries
        raise InputError(
            f"transformers cannot {action} the model",
            where=str(folder),
            found=error_text(error),
        ) from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()


# The model of a folder.


@dataclass(frozen=True)
class ModelFolder:
    """A folder of transformers, and how its model is built.

    Attributes:
      path: the folder.
      kind: the class of the model.
      config: its config.
      dtype: the element type of its parameters.
    """

    path: Path
    kind: Any
    config: Any
    dtype: Any

    @classmethod
    def of(
        cls, path: Path, document: Mapping[str, Any], *, trust_remote_code: bool,
        dtype: Any = None,
    ) -> ModelFolder:  # fmt: skip
        """Read the config of a folder.

        Args:
          path: the folder.
          document: its ``config.json``.
          trust_remote_code: whether code in the folder may run.
          dtype: the element type of the parameters; by default the one that the config states.

        Raises:
          InputError: it names no class of transformers, or has code that may not run.
        """
        import transformers

        names = document.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        where = f"{path / CONFIG_NAME}: architectures"
        if not isinstance(name, str):
            raise InputError("the config names no class of a model", where=where,
                             expected='["StarCoder2ForCausalLM"], for example')  # fmt: skip
        if "quantization_config" in document:
            raise InputError("the weights are quantised", where=str(path / CONFIG_NAME),
                             expected="weights of floating point",
                             hint="give the checkpoint that was quantised")  # fmt: skip
        with _by_transformers(path, "read the config of"):
            remote = document.get("auto_map")
            kind = getattr(transformers, name, None)
            if isinstance(remote, Mapping) and kind is None:
                if not trust_remote_code:
                    raise InputError(
                        f"the class {name} is code in the folder", where=where,
                        expected="a class of transformers",
                        hint="--trust-remote-code runs that code: read it first",
                    )  # fmt: skip
                kind = _remote_class(path, name, remote)
            if kind is None:
                raise InputError(
                    f"transformers {transformers.__version__} has no class {name}", where=where,
                    hint="a newer transformers may have it: python -m pip install -U transformers",
                )  # fmt: skip
            config = transformers.AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        dtype = dtype or getattr(config, "dtype", None)
        return cls(path, kind, config, dtype if isinstance(dtype, torch.dtype) else torch.float32)

    def on_meta(self) -> Any:
        """Return the model without weights. Raises InputError."""
        with _by_transformers(self.path, "build"), torch.device("meta"):
            return self.kind._from_config(self.config, dtype=self.dtype).eval()

    def loaded(self) -> Any:
        """Return the model with its weights.

        Raises:
          InputError: transformers cannot load it, or weights are missing.
        """
        with _by_transformers(self.path, "load"):
            model, info = self.kind.from_pretrained(
                self.path, config=self.config, dtype=self.dtype, output_loading_info=True,
                local_files_only=True,
            )  # fmt: skip
        raise_problems(
            Problem("the folder lacks a weight, which would be drawn", str(self.path), name)
            for name in sorted(info["missing_keys"])
        )
        return model.eval()


def _remote_class(path: Path, name: str, remote: Mapping[str, Any]) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = [str(text) for text in remote.values() if str(text).endswith(f".{name}")]
    if not references:
        raise InputError(f"auto_map does not say where {name} is", where=str(path / CONFIG_NAME))
    return get_class_from_dynamic_module(references[0], path, local_files_only=True)


# Inputs that a model is traced with.


def example_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Yield inputs that a model of transformers may take, on its device, likely ones first."""
    config, names = model.config, signature(model.forward).parameters
    like = next(model.parameters())
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
    frames = 2 * (getattr(config, "max_source_positions", None) or 50)

    def zeros(*shape: Any) -> Any:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    ids = torch.full((BATCH, TOKENS), TOKEN_ID, device=like.device)
    every = {
        "input_ids": ids,
        "pixel_values": zeros(BATCH, channels, height, width),
        "input_features": zeros(BATCH, mel, frames),
        "input_values": zeros(BATCH, 16_000),
        "bbox": ids[..., None].expand(-1, -1, 4) * 0,
        "decoder_input_ids": ids,
    }
    common = {n: every[n] for n in ("decoder_input_ids", "bbox") if n in names}
    for name in dict.fromkeys((model.main_input_name, *every)):
        if name in names and name in every and name not in common:
            yield {name: every[name], **common}
    if {"input_ids", "pixel_values"} <= names.keys():
        yield {"input_ids": ids, "pixel_values": every["pixel_values"]}


def _surveyed(
    model: Any, inputs: Mapping[str, Array] | None
) -> tuple[SurveyedModel, dict[str, Any]]:
    """Return the blocks of a model, and the inputs with which torch could read it."""
    if inputs is not None:
        device = next(model.parameters()).device
        tensors = [{name: torch.from_numpy(x).to(device) for name, x in inputs.items()}]
    else:
        tensors = [*example_inputs(model)]
    problems: list[Problem] = []
    for each in tensors:
        try:
            exported = exported_module(model, (), each)
        except InputError as error:
            problems += error.problems
            continue
        return survey_model(model, exported), each
    hint = "--inputs FILE.npz has the inputs of the model by name"
    if not problems:
        raise InputError("no inputs of the model are known", where=type(model).__name__, hint=hint)
    raise InputError([*problems[:-1], replace(problems[-1], hint=hint)])


# Conversion.


@dataclass(frozen=True)
class FolderConversion:
    """A converted folder.

    Attributes:
      conversion: the conversion.
      tensors: the number of tensors to write.
      size_bytes: their size.
      written: what was written; None for a plan alone.
    """

    conversion: ModuleConversion
    tensors: int
    size_bytes: int
    written: WriteReport | None = None


def convert_folder(
    source: str | Path,
    out: str | Path,
    pipeline: Any,
    *,
    inputs: Mapping[str, Array] | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    allow_unmatched: bool = False,
    check: bool = True,
    dry_run: bool = False,
    force: bool = False,
    dtype: DType | None = None,
    options: WriteOptions = DEFAULTS,
) -> FolderConversion:
    """Convert a folder of transformers of any class: ``convert_folder(source, out, "upcycle")``.

    Args:
      source: the folder.
      out: the folder to write.
      pipeline: the passes, as for `convert`.
      inputs: arrays by name that the model is traced with; by default small ones of its kind.
      trust_remote_code: whether code in the folder may run.
      seed: of the random numbers.
      allow_unmatched: whether a pass that must match may match nothing.
      check: whether each pass is held to its promise, and the result proved.
      dry_run: whether nothing is written.
      force: whether an existing output is replaced.
      dtype: the element type to write; by default the one that the config states.
      options: how weights are written.

    Raises:
      UsageError: the pipeline is none, or an option has another type.
      InputError: the folder has no model that can be converted, or the output cannot be used.
      CheckError: a pass broke its promise.
      MachineError: the disk is too small, or a write failed.
    """
    path, seed = Path(folder_text(source)), whole("seed", seed)
    trust = flag("trust_remote_code", trust_remote_code)
    with open_folder(path) as checkpoint:
        folder = ModelFolder.of(
            path, checkpoint.config, trust_remote_code=trust, dtype=_torch_dtype(dtype)
        )
        model = folder.on_meta()
        surveyed, traced = _surveyed(model, inputs)
        sparse = convert_surveyed(
            surveyed, pipeline, causal=_is_causal(model), seed=seed,
            allow_unmatched=allow_unmatched, check=check, prover=Prover() if check else None,
        )  # fmt: skip
        conversion = replace(sparse.conversion, inputs=_described(traced))
        sparse.conversion = conversion
        planned = _output_tensors(sparse, dict(model.state_dict()))
        size = sum(tensor.entry.nbytes for tensor in planned)
        destination = Path(folder_text(out))
        check_output(destination, inputs=[path], force=force, needed_bytes=size)
        report = FolderConversion(conversion, len(planned), size)
        if dry_run:
            return report
        dense = dict(folder.loaded().state_dict())
        with (
            output_folder(destination, inputs=[path], force=force, needed_bytes=size) as temporary,
            hashed_beside(checkpoint.named_files()) as source_files,
        ):
            written = _write_weights(temporary, sparse, dense, options)
            _write_companions(temporary, checkpoint, conversion.dense.module)
            sparse.config.architectures = [conversion.dense.sparse]
            write_config(temporary, sparse.config, conversion)
            write_beside(temporary, conversion, written.tensors, path.name, source_files())
            checkpoint.require_unchanged()
    return replace(report, written=written)


def _torch_dtype(dtype: DType | None) -> Any:
    return None if dtype is None else tensor_of(np.empty(0, dtype.numpy)).dtype


def _is_causal(model: Any) -> bool:
    """Whether no token of a model may depend on later ones: of all but encoders alone."""
    is_encoder = type(model).__name__.endswith(("MaskedLM", "Classification", "QuestionAnswering"))
    return not is_encoder and model.main_input_name != "pixel_values"


def _described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the element types and shapes of inputs, as JSON values."""
    return {n: [str(x.dtype).removeprefix("torch."), list(x.shape)] for n, x in inputs.items()}


def _output_tensors(sparse: Any, dense: Mapping[str, Any]) -> list[OutputTensor]:
    """Return the tensors of a converted model as expressions over those of the dense one."""
    conversion = sparse.conversion
    graph, names = conversion.graph, {s: n for n, s in conversion.emitted.names.items()}
    ties = getattr(sparse, "all_tied_weights_keys", None) or {}
    leaves = leaves_of({n: shape_of(t.shape, numpy_dtype(t)) for n, t in dense.items()})
    outputs, problems = [], []
    for name, tensor in sparse.state_dict().items():
        if name in ties:
            continue
        if name in names:
            dtype = leaves_of({"": shape_of((), numpy_dtype(tensor))})[""].dtype
            outputs.append(OutputTensor(name, graph.params[names[name]].weight, dtype))
        elif name in leaves:
            outputs.append(OutputTensor(name, leaves[name].source, leaves[name].dtype))
        else:
            problems.append(Problem("a tensor has an element type that cannot be stored", name,
                                    found=str(tensor.dtype)))  # fmt: skip
    raise_problems(problems)
    return outputs


def _write_weights(
    folder: Path, sparse: Any, dense: Mapping[str, Any], options: WriteOptions
) -> WriteReport:
    arrays: dict[str, Array] = {name: array_of(tensor) for name, tensor in dense.items()}
    return write_checkpoint(
        folder, _output_tensors(sparse, dense),
        lambda name, start=0, stop=None: rows_of(arrays[name], start, stop), options,
        metadata={"moecc": __version__, "pipeline": sparse.conversion.pipeline.in_full()},
    )  # fmt: skip


def _write_companions(folder: Path, checkpoint: SafetensorsFolder, module: str) -> None:
    """Copy tokenizer, licences, and the code that the class of the dense model is in."""
    companions: dict[str, Path | bytes] = checkpoint.companions()
    if module.startswith("."):
        companions |= {file.name: file for file in checkpoint.path.glob("*.py")}
    for name, content in companions.items():
        make_folder((folder / name).parent)
        write_durable(folder / name, read_whole(content) if isinstance(content, Path) else content)


# Proof of a folder that was converted earlier.


def prove_folder(source: str | Path, result: str | Path, prover: Prover) -> ConversionProof:
    """Prove that a converted folder is the function of the folder it was converted from.

    The conversion is planned again, from the config of the source and what the folder states; the
    weights of blocks are compared by their expressions.

    Raises:
      CheckError: the result was changed since it was converted.
      InputError: it was not converted from these files, or would be another one today.
    """
    path, target = Path(folder_text(source)), Path(folder_text(result))
    with open_folder(path) as checkpoint:
        manifest = conversion_of(target, checkpoint.named_files())
    if manifest is None:
        raise InputError("the folder was not converted from these files", where=str(target),
                         found=str(path))  # fmt: skip
    document = read_json_object(target / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
    stated = document["moecc"]
    with open_folder(path, with_weights=False) as checkpoint:
        folder = ModelFolder.of(
            path, checkpoint.config, trust_remote_code=False,
            dtype=getattr(torch, document["dtype"]),
        )  # fmt: skip
    model = folder.on_meta()
    traced = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in stated["inputs"].items()
    }
    sparse = convert_surveyed(
        survey_model(model, exported_module(model, (), traced)), manifest.pipeline,
        causal=_is_causal(model), seed=manifest.seed, prover=prover,
    )  # fmt: skip
    with open_folder(target) as written:
        now = print_graph(graph_over(sparse.conversion, written.tensors))
    before = (target / GRAPH_NAME).read_text("utf-8")
    if now != before:
        lines: Sequence[tuple[str, str]] = [
            (a, b) for a, b in zip(before.splitlines(), now.splitlines(), strict=False) if a != b
        ]
        old, new = lines[0] if lines else (f"{len(before)} bytes", f"{len(now)} bytes")
        raise InputError("the conversion would write another graph today",
                         where=str(target / GRAPH_NAME), expected=new.strip(), found=old.strip(),
                         hint="moecc verify tells whether the folder was changed")  # fmt: skip
    proof: ConversionProof = sparse.conversion.proof
    # The graph names tensors alone: what was written to them is what the receipt is a proof of.
    receipt = object_of(object_of(load_receipt(target)).get("proof"))
    if (receipt.get("source"), receipt.get("result")) != (proof.source, proof.result):
        raise InputError("the receipt has no proof of this conversion", where=str(target),
                         hint="convert again, without --no-check")  # fmt: skip
    return proof
