"""A conversion: the user's model with mixtures in place of blocks, and its folder.

The model is a copy, of a class that extends the user's; what was not converted is shared with the
dense model.  `save_pretrained` writes beside the weights what `load` and the commands need: the
graph, whose parameters are read from them, a manifest, a receipt, and the mixtures as a file that
transformers loads where moecc is not installed.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from hashlib import sha256
from importlib import import_module
from itertools import islice
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from moecc.api.arguments import flag, folder_text, whole
from moecc.errors import InputError, Problem, UsageError, raise_problems
from moecc.formats.files import json_content, read_json_object, write_durable
from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES, open_folder
from moecc.formats.manifest import (
    MANIFEST_NAME,
    FileRecord,
    TensorRecord,
)
from moecc.formats.run import GRAPH as GRAPH_NAME
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import print_graph, read_graph
from moecc.jobs.receipt import RECEIPT_NAME, Receipt
from moecc.model.open import MAX_READ_ELEMENTS, MODULE_SCHEMA, MODULE_TYPE
from moecc.prove import Prover
from moecc.prove.conversion import ConversionProof, compared
from moecc.rewrite.passes import Context, Pass
from moecc.rewrite.pipeline import Pipeline
from moecc.support.text import with_article
from moecc.types import Array, Axis, TensorType
from moecc.weights.arithmetic import Cast
from moecc.weights.expr import Expr, Source, sources
from moecc.weights.simplify import simplify
from moecc_backends.jaxpr.graph import (
    BlocksConversion,
    RewrittenBlocks,
    graph_of_blocks,
    parsed_pipeline,
    rewrite_blocks,
)
from moecc_backends.jaxpr.scopes import leaves_of
from moecc_backends.jaxpr.storage import LeafEvaluator
from moecc_backends.jaxpr.views import shape_of
from moecc_backends.torch_export.exporting import exported_module
from moecc_backends.torch_export.surveying import SurveyedModel, numpy_dtype, survey_model
from moecc_backends.torch_source.modules import BlockPlace, DenseClass, EmittedModules, emit_modules

FILE_NAME = "modeling_moecc.py"


@dataclass(frozen=True, repr=False)
class ModuleConversion(BlocksConversion):
    """What a model with mixtures was made by.

    Attributes:
      places: where the mixtures stand.
      emitted: the mixtures as text.
      dense: the class of the dense model.
      proof: the proof that the blocks are those of the dense model, if one was tried.
      inputs: the inputs that a folder was traced with, as JSON values.
    """

    places: tuple[BlockPlace, ...]
    emitted: EmittedModules
    dense: DenseClass
    proof: ConversionProof | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> ModuleConversion:
        return self

    def __reduce__(self) -> str:
        # Its model is of a class that no other process can import.
        raise InputError(
            "a converted model cannot be pickled as a whole",
            where=self.dense.sparse,
            hint="moe.save_pretrained(folder) and mt.load; or torch.save(moe.state_dict(), file)",
        )


def convert(
    model: Any,
    inputs: Any,
    pipeline: str | Pass | Pipeline | Sequence[str | Pass],
    *,
    causal: bool = True,
    seed: int = 0,
    allow_unmatched: bool = False,
    check: bool = False,
) -> Any:
    """Upcycle a module of PyTorch: ``convert(model, {"input_ids": ids}, "upcycle{experts=8}")``.

    Args:
      model: the dense model, which stays as it is; parameters that are not converted are shared.
      inputs: what it is called with: a tensor, a tuple, or a dictionary of arguments by name.
      pipeline: the passes, as text, a pass, several of either, or parsed.
      causal: whether no token may depend on later ones; routings that look ahead are rejected.
      seed: of the random numbers.
      allow_unmatched: whether a pass that must match may match nothing.
      check: whether each pass is held to its promise, on the graph at reduced sizes.

    Returns:
      A model of a class that extends that of `model`, with methods `losses` and `save_pretrained`
      and the `conversion`.

    Raises:
      UsageError: the pipeline is none, or an option has another type.
      InputError: torch cannot export the model, it has no such block, or a pass does not fit it.
      CheckError: a pass broke its promise.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            "not a module of PyTorch", expected="a torch.nn.Module", found=type(model).__name__
        )
    for name, value in (("causal", causal), ("allow_unmatched", allow_unmatched), ("check", check)):
        flag(name, value)
    seed = whole("seed", seed)
    parsed_pipeline(pipeline)
    _require_dense(model)
    args, kwargs = _call_of(inputs)
    surveyed = survey_model(model, exported_module(model, args, kwargs))
    return convert_surveyed(
        surveyed, pipeline, causal=causal, seed=seed, allow_unmatched=allow_unmatched, check=check
    )


def _require_dense(model: Any) -> None:
    where = type(model).__name__
    if hasattr(model, "_orig_mod"):
        hint = "convert model._orig_mod, and compile the result"
        raise InputError("the model is compiled by torch.compile", where=where, hint=hint)
    if isinstance(getattr(model, "conversion", None), ModuleConversion):
        hint = "convert the dense model, with all passes in one pipeline"
        raise InputError("the model has mixtures already", where=where, hint=hint)


def _call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def convert_surveyed(
    surveyed: SurveyedModel,
    pipeline: str | Pass | Pipeline | Sequence[str | Pass],
    *,
    causal: bool = True,
    seed: int = 0,
    allow_unmatched: bool = False,
    check: bool = False,
    prover: Prover | None = None,
) -> Any:
    """Return a model whose blocks are known, converted: `convert` without its survey.

    With a `prover`, the blocks are proved to be those of the dense model, where passes promise it.
    """
    model, passes = surveyed.model, parsed_pipeline(pipeline)
    arrays = {name: _shape_or_array(t) for name, t in surveyed.exported.parameters.items()}

    def read(weight: Expr) -> Array | None:
        names = {source.name for source in sources(weight)}
        if any(surveyed.exported.parameters[n].is_meta for n in names):
            return None
        small = prod(weight.type.shape) <= MAX_READ_ELEMENTS
        return LeafEvaluator(arrays).evaluate(weight) if small else None

    context = Context(seed=seed, allow_unmatched=allow_unmatched, read=read)
    rewritten = rewrite_blocks(
        surveyed.survey, {}, passes, context, name=type(model).__name__, causal=causal, check=check
    )
    conversion = _conversion(surveyed, rewritten, seed)
    if prover is not None and rewritten.run.preserves.is_equality:
        source = graph_of_blocks(
            surveyed.survey, name=type(model).__name__, is_causal=causal, labels={}
        )
        proof = compared(source, rewritten.graph, prover, refute=False)
        conversion = replace(conversion, proof=proof)
    return _converted_model(model, conversion, arrays)


def _with_downs(position: BlockPlace, rewritten: RewrittenBlocks) -> BlockPlace:
    """Return a place with the names of what became of its last weight."""
    params = rewritten.parts.blocks[position.loc].params
    downs = (
        p.name
        for p in params
        if p.weight is not None and position.downs[0] in {s.name for s in sources(p.weight)}
    )
    return replace(position, downs=tuple(downs))


def _conversion(surveyed: SurveyedModel, rewritten: RewrittenBlocks, seed: int) -> ModuleConversion:
    model, exported = surveyed.model, surveyed.exported
    locations = [loc for loc in rewritten.keys if loc in rewritten.converted]
    places = tuple(_with_downs(surveyed.places[loc], rewritten) for loc in locations)
    dense = _dense_class(model)
    emitted = emit_modules(rewritten.graph, places, dense)
    params = {n: rewritten.graph.params[n].type.shape for n in emitted.names}
    used = {s.name for n in params for s in sources(_weight(rewritten.graph, n))}
    before = {n: prod(t.shape) for n, t in exported.parameters.items()}
    after = sum(before.values()) - sum(before[n] for n in used) + sum(map(prod, params.values()))
    operations = sum(node.op == "call_function" for node in exported.graph.nodes)
    stayed = f"of {operations:,} operations, all but the blocks stayed PyTorch"
    report = rewritten.report(surveyed.survey, dense.name, sum(before.values()), after, stayed)
    remarks = [*surveyed.remarks, *report.remarks]
    if not dense.config and "loss.auxiliary" in rewritten.graph.outputs:
        remarks.append(_ADDED_LOSS)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    remarks += [
        f"{loc}: its router is frozen, as the weights of the block are"
        for loc in locations
        if not trained[_first_source(rewritten.graph, loc)]
    ]
    home = sys.modules.get(type(model).__module__)
    if home is None or dense.module == "__main__" or not hasattr(home, dense.name):
        remarks.append(
            f"{FILE_NAME} of a saved folder imports {dense.name} from {dense.module}, where other "
            "programs do not find it: define the class at the top of a module of its own"
        )
    report = replace(report, remarks=tuple(remarks))
    return ModuleConversion(
        rewritten.graph,
        report,
        rewritten.pipeline,
        seed,
        rewritten.run.preserves,
        rewritten.contracts,
        places,
        emitted,
        dense,
    )


_ADDED_LOSS = (
    "loss.auxiliary is added to the `loss` of a dictionary or an object that the model returns; to "
    'any other loss add it yourself: loss + moe.losses()["loss.auxiliary"]'
)


def _dense_class(model: Any) -> DenseClass:
    kind, config = type(model), getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or config is None:
        return DenseClass(kind.__module__, kind.__name__)
    owner = type(config)
    names = _module_of(owner), owner.__name__, str(config.model_type)
    return DenseClass(_module_of(kind), kind.__name__, *names)


def _module_of(kind: type) -> str:
    """Return the module to import a class from: beside the emitted file where a folder has it."""
    is_remote = kind.__module__.startswith("transformers_modules.")
    return f".{kind.__module__.rpartition('.')[2]}" if is_remote else kind.__module__


def _weight(graph: Graph, name: str) -> Expr:
    weight = graph.params[name].weight
    assert weight is not None, "every parameter has one"
    return weight


# Tensors as arrays.


def array_of(tensor: Any) -> Array:
    """Return the elements of a tensor, without a copy where it lies in the memory of the host."""
    flat = tensor.detach().cpu().contiguous()
    if str(flat.dtype) == "torch.bfloat16":
        array: Array = flat.view(torch.int16).numpy().view(numpy_dtype(tensor))
        return array
    return np.asarray(flat.numpy())


def tensor_of(array: Array) -> Any:
    """Return an array as a tensor."""
    array = np.array(array, order="C")
    if array.dtype == numpy_dtype(torch.empty(0, dtype=torch.bfloat16)):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _shape_or_array(tensor: Any) -> Any:
    return shape_of(tensor.shape, numpy_dtype(tensor)) if tensor.is_meta else array_of(tensor)


# The model.


def _config_class(conversion: ModuleConversion, dense: Any) -> Any:
    """Return the class of the config, which may be another than the class of the model states."""
    config, names = getattr(dense, "config_class", None), conversion.dense
    is_stated = config is None or config.__name__ == names.config
    if is_stated or not names.config_module.startswith("transformers."):
        return config
    return getattr(import_module(names.config_module), names.config)


def _loaded_module(conversion: ModuleConversion, dense: type) -> ModuleType:
    """Return the emitted text as a module of Python."""
    emitted = conversion.emitted
    name = f"moecc_modules_{sha256(emitted.text.encode()).hexdigest()[:16]}_{id(dense)}"
    if name not in sys.modules:
        module, file = ModuleType(name), f"<{name}>"
        text = emitted.text.replace(emitted.imports, "\n")
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        module.__dict__[dense.__name__] = dense
        config = _config_class(conversion, dense)
        if config is not None:
            module.__dict__[config.__name__] = config
        sys.modules[name] = module
        exec(compile(text, file, "exec"), module.__dict__)
    return sys.modules[name]


def _sparse_class(conversion: ModuleConversion, dense: type) -> Any:
    """Return the class of a converted model, which writes what `load` needs."""
    sparse = vars(_loaded_module(conversion, dense))[conversion.dense.sparse]
    inherited = getattr(dense, "save_pretrained", None)

    def save_pretrained(self: Any, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the model to a folder, with its graph, manifest and receipt."""
        path = Path(folder_text(folder))
        without_weights = (n for n, p in self.named_parameters() if p.is_meta)
        for name in islice(without_weights, 1):
            raise InputError(
                "a model on the device meta has no weights to save",
                where=f"{type(self).__name__}: {name}",
                hint="convert a model with weights; moecc convert --via torch reads a folder's",
            )
        if inherited is not None:
            # Tensors have the names of their modules, and not those of the dense checkpoint.
            inherited(self, path, *args, **{"save_original_format": False, **kwargs})
            write_config(path, self.config, self.conversion)
        else:
            from safetensors.torch import save_model

            path.mkdir(parents=True, exist_ok=True)
            save_model(self, str(path / "model.safetensors"))
            document = {"model_type": MODULE_TYPE, "moecc": _config(self.conversion)}
            _write(path / CONFIG_NAME, json_content(document))
        with open_folder(path) as checkpoint:
            records = {
                name: TensorRecord(
                    sha256(np.ascontiguousarray(checkpoint.read(name)).tobytes()).hexdigest(),
                    info.dtype.name,
                    tuple(info.shape),
                    Path(info.file).name,
                )
                for name, info in checkpoint.tensors.items()
            }
        write_beside(path, self.conversion, records)

    sparse.save_pretrained = wraps(inherited)(save_pretrained) if inherited else save_pretrained
    return sparse


def write_config(path: Path, config: Any, conversion: ModuleConversion) -> None:
    """Write the config of a converted model of transformers.

    It names the classes of the folder: by its own type the model would be loaded as dense.
    """
    import transformers

    dense, file = conversion.dense, path / CONFIG_NAME
    config.moecc = _config(conversion)
    config.save_pretrained(path)
    document = read_json_object(file, limit_bytes=MAX_CONFIG_BYTES)
    autos = [name for name in dir(transformers) if name.startswith("AutoModel")]
    names = {n: getattr(getattr(transformers, n), "_model_mapping", None) for n in autos}
    module = FILE_NAME.removesuffix(".py")
    document |= {
        "model_type": dense.sparse_type,
        "architectures": [dense.sparse],
        "auto_map": {
            "AutoConfig": f"{module}.{dense.sparse_config}",
            **{
                name: f"{module}.{dense.sparse}"
                for name, mapping in names.items()
                if mapping is not None and dense.name in mapping._model_mapping.values()
            },
        },
    }
    _write(file, json_content(document))


def _converted_model(model: Any, conversion: ModuleConversion, arrays: Mapping[str, Any]) -> Any:
    """Return a copy of a model with its mixtures, which shares what was not converted."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    sparse = deepcopy(model, shared)
    sparse.__class__ = _sparse_class(conversion, type(model))
    module = sys.modules[type(sparse).__module__]
    with torch.device("meta"):
        module.place_mixtures(sparse)
    dense = dict(model.named_parameters())
    likes = {
        position.loc: dense[place_source]
        for position in conversion.places
        if (place_source := _first_source(conversion.graph, position.loc))
    }
    for name, stored in conversion.emitted.names.items():
        param = conversion.graph.params[name]
        weight = _weight(conversion.graph, name)
        like = (
            dense[next((s.name for s in sources(weight)), "")]
            if sources(weight)
            else (likes[param.loc])
        )
        _set_parameter(sparse, stored, _new_tensor(weight, like, arrays), like.requires_grad)
    sparse.conversion = conversion
    return sparse


def _set_parameter(model: Any, name: str, tensor: Any, requires_grad: bool = True) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, torch.nn.Parameter(tensor, requires_grad))


def _first_source(graph: Graph, loc: str) -> str:
    return next(
        s.name
        for p in graph.params.values()
        if p.loc == loc and p.weight is not None
        for s in sources(p.weight)
    )


def _new_tensor(weight: Expr, like: Any, arrays: Mapping[str, Any]) -> Any:
    if like.is_meta:
        return torch.empty(weight.type.shape, dtype=like.dtype, device="meta")
    dtype = next(iter(leaves_of({"": shape_of((), numpy_dtype(like))}).values())).dtype
    cast = simplify(Cast(weight, dtype))
    array = LeafEvaluator(arrays).evaluate(cast)
    return tensor_of(array).to(like.device)


# The folder.


def _config(conversion: ModuleConversion) -> dict[str, object]:
    """Return what `load` needs besides the graph, as JSON values."""
    return {
        "schema": MODULE_SCHEMA,
        "dense": asdict(conversion.dense),
        **conversion.facts(),
        "places": [asdict(position) for position in conversion.places],
        "inputs": dict(conversion.inputs),
    }


def graph_over(conversion: ModuleConversion, tensors: Mapping[str, Any]) -> Graph:
    """Return the graph of a conversion with its parameters read from the tensors of its folder."""
    graph = clone(conversion.graph)
    for name, stored in conversion.emitted.names.items():
        param, tensor = graph.params[name], tensors[stored]
        axes = zip(param.type.names, tensor.shape, strict=True)
        type = TensorType(tensor.dtype, tuple(Axis(n, size) for n, size in axes))
        param.weight = Source(stored, type)
    graph.attrs |= {"checkpoint": ".", "language": "torch"}
    return graph


def write_beside(
    path: Path,
    conversion: ModuleConversion,
    tensors: Mapping[str, TensorRecord],
    source: str = "",
    source_files: Mapping[str, FileRecord] | None = None,
) -> None:
    """Write the graph, the mixtures as text, receipt and manifest beside the weights.

    Args:
      path: the folder.
      conversion: what it holds.
      tensors: the tensors that were written.
      source: the name of the source; by default the class of the dense model.
      source_files: the files of a source that is a folder, by name; None of a model, beside which
        a trainer may have folders.
    """
    with open_folder(path) as checkpoint:
        graph = graph_over(conversion, checkpoint.tensors)
    receipt = Receipt(
        MODULE_TYPE, conversion.preserves, conversion.contracts, conversion.proof, None, ()
    )
    _write(path / GRAPH_NAME, print_graph(graph).encode())
    _write(path / FILE_NAME, conversion.emitted.text.encode())
    _write(path / RECEIPT_NAME, receipt.content())
    manifest = conversion.manifest(
        path,
        MODULE_TYPE,
        tensors,
        source or f"{conversion.dense.module}.{conversion.dense.name}",
        source_files=source_files or {},
        is_flat=source_files is None,
    )
    _write(path / MANIFEST_NAME, manifest)


def _write(path: Path, content: bytes) -> None:
    """Write a file, in place of an earlier one: a trainer saves to one folder again."""
    path.unlink(missing_ok=True)
    write_durable(path, content)


def load(folder: str | Path, model: Any = None) -> Any:
    """Return the model that `save_pretrained` wrote to a folder.

    No code of the folder runs: its graph is written as modules anew.

    Args:
      folder: the folder.
      model: the dense model, of any weights; needed unless its class is of transformers.

    Raises:
      UsageError: `folder` is no path.
      InputError: the folder has no such model, or `model` is another one.
    """
    path = Path(folder_text(folder))
    document = read_json_object(path / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
    config = document.get("moecc")
    if not isinstance(config, dict) or config.get("schema") != MODULE_SCHEMA:
        raise InputError(
            "the folder does not hold a converted module",
            where=str(path),
            expected=MODULE_SCHEMA,
            hint="`save_pretrained` of a converted model writes one",
        )
    conversion = _loaded_conversion(path, config)
    if model is None:
        dense = _class_of_transformers(conversion.dense, path)
        sparse = _sparse_class(conversion, dense).from_pretrained(path)
    else:
        sparse = _loaded_into(model, conversion, path)
    sparse.conversion = conversion
    return sparse


def _loaded_into(model: Any, conversion: ModuleConversion, path: Path) -> Any:
    """Return a copy of a dense model with the mixtures and the weights of a folder."""
    from safetensors.torch import load_file

    expected = conversion.dense.name
    if type(model).__name__ != expected:
        raise InputError(
            "the folder holds a model of another class",
            where=str(path),
            expected=f"load(folder, model), with {with_article(expected)}",
            found=type(model).__name__,
            hint="give the dense model, of any weights",
        )
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    paths = (p for position in conversion.places for p in (position.path, position.last) if p)
    raise_problems(
        Problem("the model has no such module, which became a mixture", f"{path}: {name}")
        for name in sorted(set(paths) - modules)
    )
    device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    sparse = deepcopy(model)
    sparse.__class__ = _sparse_class(conversion, type(model))
    with torch.device("meta"):
        sys.modules[type(sparse).__module__].place_mixtures(sparse)
    _fill_tensors(sparse, load_file(path / "model.safetensors"), device, path)
    return sparse


def _fill_tensors(model: Any, tensors: Mapping[str, Any], device: Any, path: Path) -> None:
    """Give a model the tensors of a folder, which has one name of those that share memory.

    A tensor on the device meta is replaced, on `device`; the elements of others are copied.

    Raises:
      InputError: names or shapes differ, or a buffer stays without elements.
    """
    sharing: dict[int, dict[str, Any]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        memory = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
        sharing.setdefault(memory, {})[name] = tensor
    problems = [
        Problem("the model has no such tensor", f"{path}: {name}")
        for name in tensors.keys() - state.keys()
    ]
    for group in sharing.values():
        stored = [name for name in group if name in tensors]
        if not stored:
            problems.append(
                Problem("the folder has no such tensor", f"{path}: {next(iter(group))}")
            )
        for name in stored:
            old, new = group[name], tensors[name]
            if old.shape != new.shape:
                shapes = str(list(new.shape)), str(list(old.shape))
                problems.append(
                    Problem("the model has another shape of a tensor", f"{path}: {name}", *shapes)
                )
            elif old.is_meta:
                _replace_tensor(model, group, old, new.to(device))
            else:
                old.data.copy_(new)
    every = [*model.named_parameters(), *model.named_buffers()]
    hint = "build the model that load takes on another device"
    problems += [
        Problem("a buffer that is not saved is on the device meta", f"{path}: {name}", hint=hint)
        for name, tensor in every
        if tensor.is_meta and name not in state
    ]
    raise_problems(sorted(problems, key=str))


def _replace_tensor(model: Any, names: Iterable[str], old: Any, new: Any) -> None:
    """Put a tensor where modules had another one, a parameter where that was one."""
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, old.requires_grad)
    for name in names:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, new)


def _class_of_transformers(dense: DenseClass, path: Path) -> Any:
    import transformers

    dense_class = getattr(transformers, dense.name, None)
    if not dense.module.startswith("transformers.") or dense_class is None:
        raise InputError(
            f"the class {dense.name} is not one of transformers",
            where=str(path),
            hint=f"load(folder, model), with {with_article(dense.name)}",
        )
    return dense_class


def _loaded_conversion(path: Path, config: Mapping[str, Any]) -> ModuleConversion:
    graph = read_graph(str(path / GRAPH_NAME))
    places = tuple(
        BlockPlace(**{**position, "downs": tuple(position["downs"])})
        for position in config["places"]
    )
    dense = DenseClass(**config["dense"])
    return ModuleConversion(
        graph,
        **BlocksConversion.stated(config),
        places=places,
        emitted=emit_modules(graph, places, dense),
        dense=dense,
    )
