"""Export a graph as a GGUF file for llama.cpp: keys, and an expression for each tensor.

The graph is first mapped onto the family of Hugging Face that the architecture of GGUF stands for,
so that the file holds a model that is known to compute the graph; its tensors are then renamed,
and the rows of queries and keys put in the order of llama.cpp's rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moecc.errors import InputError, Problem, UsageError, nearest, raise_problems
from moecc.families.decoder import DecoderConfig
from moecc.families.experts import expert_layers
from moecc.families.gemma4 import Gemma4TextConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS
from moecc.formats.gguf.config import config_keys, misfits, rotary_divisors
from moecc.formats.gguf.families import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    GgufFamily,
    dense_architectures,
    families_of,
    gguf_name,
    hugging_face_name,
    is_norm,
    mixture_architectures,
    turned_projection,
)
from moecc.formats.gguf.header import Key, storage_of
from moecc.formats.gguf.layer_inputs import (
    as_stored,
    gemma4_as_read,
    gemma4_keys,
    gemma4_misfits,
    gemma4_tensors,
)
from moecc.formats.gguf.rearranged import cut, join
from moecc.formats.gguf.storage import BY_NAME, DECAYS, SUFFIX, Storage, require_package
from moecc.formats.writer import OutputTensor
from moecc.ir.graph import Graph
from moecc.support.text import with_article
from moecc.translate.export import Export, export_graph
from moecc.types import F16, F32, F64, DType, tensor
from moecc.weights.arithmetic import Add
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat, Index, Merge, Permute, Split, Stack
from moecc.weights.simplify import simplify

PREFIX, GEMMA4, AUTO = "gguf:", "gemma4", "auto"
_READ_ONLY = {
    "gemma3n": "llama.cpp cuts neurons off by a standard deviation over n − 1 of them, and "
    "transformers over n; --to gemma3n_text writes a folder"
}
"""Why architectures are not written whose models llama.cpp computes otherwise."""


# llama.cpp computes the sigmoid of a shared expert's gate as silu(x) / x, which is NaN for the
# zeros that `upcycle` writes.  Added to any other weight this changes no bit.
_ALMOST_ZERO = 1e-20


@dataclass(frozen=True)
class GgufExport:
    """The content of a GGUF file.

    Attributes:
      architecture: ``general.architecture``.
      config: the typed config of the family of Hugging Face that the file is mapped onto.
      keys: those of the architecture.
      tensors: the tensors by their names in the file, in the order of the model.
      tokenizer: the keys of the tokenizer, which do not depend on the graph.
      up_to: how far the family is from holding the graph; see `Export`.
    """

    architecture: str
    config: DecoderConfig | Gemma4TextConfig
    keys: list[Key]
    tensors: list[tuple[str, Expr]]
    tokenizer: list[Key] = field(default_factory=list)
    up_to: str = ""

    @property
    def config_json(self) -> dict[str, object]:
        """The config of the family of Hugging Face."""
        return self.config.to_json()


def architecture_of(target: str) -> str | None:
    """Return the architecture that a target ``gguf:ARCH`` names, or None for a family.

    ``gguf:auto`` stands for the one that `choose_architecture` takes.

    Raises:
      UsageError: moecc writes no such architecture.
    """
    if not target.startswith(PREFIX):
        return None
    name = target.removeprefix(PREFIX)
    names = architectures()
    if name in names or name == AUTO:
        return name
    config = CONFIGS.get(name)
    stored_as = name if config is None or config.gguf is None else config.gguf.architecture
    if stored_as in _READ_ONLY:
        hint: str | None = _READ_ONLY[stored_as]
    elif config is None:
        hint = nearest(name, names)
    elif stored_as in names:
        hint = f"{name} is {PREFIX}{stored_as} there"
    else:
        hint = f"no GGUF of {with_article(name)} is written; --to {name} writes a folder"
    raise UsageError(
        f"unknown architecture of GGUF {name!r}", expected=f"one of {', '.join(names)}", hint=hint
    )


def architectures() -> tuple[str, ...]:
    """Return the architectures that can be written."""
    return tuple(dict.fromkeys((*dense_architectures(), *mixture_architectures(), GEMMA4)))


def choose_architecture(graph: Graph) -> GgufExport:
    """Return `graph` as a GGUF file of the first architecture that holds it, its own before others.

    Raises:
      InputError: none does; the reasons against the one with the fewest.
    """
    if graph.family == Gemma4TextConfig.model_type:
        return export_gguf(graph, GEMMA4)
    table = mixture_architectures() if expert_layers(graph) else dense_architectures()
    config = CONFIGS.get(graph.family)
    natural = None if config is None or config.gguf is None else config.gguf.architecture
    refused: dict[str, tuple[Problem, ...]] = {}
    for architecture in sorted(table, key=lambda name: name != natural):
        try:
            return export_gguf(graph, architecture)
        except InputError as error:
            refused[architecture] = error.problems
    closest = min(refused, key=lambda name: len(refused[name]))
    fault = f"no architecture of llama.cpp holds this model; the nearest is {closest}"
    hint = f"--to auto holds it in a folder, whose name does not end in {SUFFIX}"
    raise InputError([Problem(fault, hint=hint), *refused[closest]])


def export_gguf(graph: Graph, architecture: str) -> GgufExport:
    """Return `graph` as a GGUF file of `architecture`; no weight is read.

    Raises:
      InputError: the architecture cannot express the graph, or llama.cpp would compute another
        function from it; all reasons.
    """
    if architecture == GEMMA4:
        return _export_gemma4(graph)
    sparse = bool(expert_layers(graph))
    table = mixture_architectures() if sparse else dense_architectures()
    if architecture not in table:
        kind = "mixtures of experts" if sparse else "dense models"
        raise InputError(
            f"there are no {kind} of the architecture {architecture}",
            expected=f"one of {', '.join(table)}",
            hint=None if sparse else "make some layers sparse first, with upcycle",
        )
    families = families_of(architecture, sparse=sparse)
    mapped = _as_family(graph, [family.config.model_type for family in families])
    config, tensors = mapped.config, mapped.tensors
    assert isinstance(config, DecoderConfig), "GGUF is written for decoders"
    family = next(family for family in families if family.config is type(config))
    stated = config.to_json()
    layers = config.sparse_layers if isinstance(config, MoeConfig) else ()
    raise_problems(misfits(architecture, family, stated, layers))
    if family.facts.needs_routing_bias and isinstance(config, MoeConfig):
        tensors = [*tensors, *MoeConfig.completed(config)[1].items()]
    stored: dict[str, Expr] = {}
    for name, expr in tensors:
        prefix, joined = family.whole_of(name)
        if joined:
            ends = family.rearranged()[joined]
            for end, part in zip(ends, cut(joined, expr, config), strict=True):
                stored[prefix + end] = simplify(part)
        else:
            stored[gguf_name(name, family)] = _turned(name, expr, family, config)
    if family.facts.needs_head:
        stored.setdefault(HEAD, stored[EMBEDDING])
    if (divisors := rotary_divisors(stated)) is not None:
        parts = tuple(Full(value, tensor(F32, pair=1)) for value in divisors)
        stored[ROPE_FACTORS] = Concat(parts, "pair")
    keys = config_keys(architecture, family, stated)
    up_to = mapped.up_to
    if isinstance(config, MoeConfig) and config.sum_floor:
        # llama.cpp divides gates by their sum alone.
        up_to = config.others_up_to
    if family.has("delta"):
        up_to = DECAYS_ROUNDED
    return GgufExport(architecture, config, keys, list(stored.items()), up_to=up_to)


def _export_gemma4(graph: Graph) -> GgufExport:
    mapped = _as_family(graph, [Gemma4TextConfig.model_type], layout="experts")
    config = mapped.config
    assert isinstance(config, Gemma4TextConfig), "a config of the family"
    raise_problems(gemma4_misfits(PREFIX + GEMMA4, config))
    stored = list(gemma4_tensors(config, mapped.tensors).items())
    return GgufExport(GEMMA4, as_stored(config), gemma4_keys(GEMMA4, config), stored)


def _as_family(graph: Graph, names: Sequence[str], layout: str = "stacked") -> Export:
    """Map `graph` onto the first of several families that can express it."""
    problems: list[Problem] = []
    for name in names:
        try:
            return export_graph(graph, name, layout=layout)
        except InputError as error:
            problems.extend(map(_of_folders, error.problems))
    raise InputError(problems)


def _of_folders(problem: Problem) -> Problem:
    """Say of a hint at another family that it is none at another architecture of GGUF."""
    if problem.hint is None or " can express " not in problem.hint:
        return problem
    return replace(problem, hint=f"in a folder, not in GGUF: {problem.hint}")


def _turned(name: str, expr: Expr, family: GgufFamily, config: DecoderConfig) -> Expr:
    """Return a tensor with rows and axes as the file stores them."""
    if family.has("norm_offset") and is_norm(name):
        return simplify(Add(expr, Full(1.0, expr.type.with_dtype(F32))))
    if (unit_axis := family.unit_axis(name)) is not None:
        row = Index(expr, expr.type.names[unit_axis], 0)
        if len(row.type.shape) > 1 or family.mixture is None or not family.mixture.shared_gate:
            return simplify(row)
        return simplify(Add(row, Full(_ALMOST_ZERO, row.type.with_dtype(F32))))
    turned = turned_projection(name) if family.facts.pairs_neighbours else None
    if turned is None:
        return expr
    heads = config.num_attention_heads if turned == "q" else config.num_key_value_heads
    return simplify(neighbours_from_halves(expr, heads, config.head_dim))


def neighbours_from_halves(expr: Expr, heads: int, head_dim: int) -> Expr:
    """Return the rows of a projection so that the rotary embedding rotates neighbours.

    Row i of a head of Hugging Face becomes row 2i, and row i + head_dim / 2 row 2i + 1.
    """
    rows, *others = expr.type.names
    split = Split(expr, rows, (("head", heads), ("half", 2), ("pair", head_dim // 2)))
    ordered = Permute(split, ("head", "pair", "half", *others))
    return Merge(ordered, ("head", "pair", "half"), rows)


def as_read(export: GgufExport) -> dict[str, Expr]:
    """Return the tensors of a file as it is read back, by their names in Hugging Face.

    This is what `moecc.formats.gguf.reader` does to stored arrays: offsets of norms, matrices of
    one row and the order of rotated rows are undone.
    """
    config, stored = export.config, dict(export.tensors)
    if isinstance(config, Gemma4TextConfig):
        return gemma4_as_read(stored)
    assert config.gguf is not None, "a family with an architecture"
    family = GgufFamily(type(config), config.gguf)
    tensors: dict[str, Expr] = {}
    for stored_name, expr in export.tensors:
        name = hugging_face_name(stored_name, family)
        if name is None:  # divisors of rotary frequencies, which the config has
            continue
        prefix, joined = family.whole_of(name)
        if joined:
            ends = [prefix + end for end in family.rearranged()[joined]]
            if stored_name != ends[0]:  # it is read with the first
                continue
            expr = join(joined, [stored[end] for end in ends], config)
        elif family.has("norm_offset") and is_norm(name):
            expr = Add(expr, Full(-1.0, expr.type.with_dtype(F32)))
        elif (unit_axis := family.unit_axis(name)) is not None:
            expr = Stack((expr,), "row", unit_axis)
        elif family.facts.pairs_neighbours and turned_projection(name) is not None:
            rows, *others = expr.type.names
            count = expr.type[rows].size
            assert isinstance(count, int), "a weight has fixed sizes"
            heads = count // config.head_dim
            sizes = (("head", heads), ("pair", config.head_dim // 2), ("half", 2))
            ordered = Permute(Split(expr, rows, sizes), ("head", "half", "pair", *others))
            expr = Merge(ordered, ("head", "half", "pair"), rows)
        tensors[name] = expr
    return tensors


def check_type(dtype: DType | Storage | None, architecture: str | None) -> None:
    """Raise UsageError unless an output can be written in `dtype`.

    Args:
      dtype: an element type, the blocks of a GGUF file, or None for that of the source.
      architecture: that of a GGUF file, or None for a folder.
    """
    if isinstance(dtype, Storage) and architecture is None:
        fault = f"only a GGUF file can hold {dtype.name.lower()}"
        raise UsageError(
            fault, hint=f"--to {PREFIX}{next(iter(mixture_architectures()))} writes one"
        )
    if isinstance(dtype, DType) and architecture is not None and storage_of(dtype) is None:
        raise UsageError(
            "a GGUF file has no such element type",
            expected=f"one of f32, f16, bf16, {', '.join(QUANTISED)}",
            found=dtype.name,
        )


QUANTISED: Mapping[str, Storage] = {n.lower(): BY_NAME[n] for n in ("Q8_0", "Q4_K")}
"""The blocks that are quantised to, by the names of ``--dtype``."""


DECAYS_ROUNDED = (
    "a rounding of rates of decay, which files have as −exp(A_log), and 1e-06 beside the squared "
    "lengths of queries and keys, which llama.cpp adds otherwise"
)
_ALWAYS_F32 = (".ffn_gate_inp", ".shortconv.conv.", ".ssm_conv1d.")


def stored_as(name: str, expr: Expr, dtype: DType, storage: Storage | None) -> OutputTensor:
    """Return a tensor of a GGUF file in the type that llama.cpp wants of it.

    Vectors, routers and taps are float32, as every converter writes them.  Rows that are no whole
    blocks are written in smaller ones, those of q8_0, or in half precision.

    Args:
      name: its name in the file.
      expr: its expression.
      dtype: the type of plain matrices.
      storage: the blocks of quantised ones, if any.
    """
    shape = expr.type.shape
    if name.endswith(".ssm_a"):
        return OutputTensor(name, expr, F32, DECAYS)
    if len(shape) < 2 or name.endswith(".bias") or any(part in name for part in _ALWAYS_F32):
        return OutputTensor(name, expr, F32)
    if storage is not None:
        fits = (
            blocks_type
            for blocks_type in (storage, QUANTISED["q8_0"])
            if shape[-1] % blocks_type.block == 0
        )
        blocks = next(fits, None)
        return OutputTensor(name, expr, F16 if blocks is None else F32, blocks)
    return OutputTensor(name, expr, F32 if dtype is F64 or storage_of(dtype) is None else dtype)


def quantising_remarks(export: GgufExport, storage: Storage | None) -> list[str]:
    """Return remarks on matrices that have no blocks of `storage`; check that any can be made.

    Raises:
      MachineError: the `gguf` package is missing.
    """
    if storage is None:
        return []
    require_package(storage)
    outputs = [stored_as(name, expr, F32, storage) for name, expr in export.tensors]
    others: dict[str, list[str]] = {}
    for output in outputs:
        is_other = output.storage is not storage and output.storage is not DECAYS
        if is_other and (output.storage is not None or output.dtype is F16):
            kind = "f16" if output.storage is None else output.storage.name.lower()
            others.setdefault(kind, []).append(output.name)
    return [
        f"{len(names)} matrices, the first {names[0]}, are written in {kind}: their rows are no "
        f"multiple of {storage.block}, the block of {storage.name.lower()}"
        for kind, names in others.items()
    ]
