"""MaxText's checkpoints: its arrays as the tensors of Hugging Face, and the other way round."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moecc.errors import Problem, Problems, quoted, raise_problems
from moecc.families.config import MaxTextFacts, ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS
from moecc.formats.arrays import ArrayPiece, NamedPieces, Tree
from moecc.support.lazy import np
from moecc.support.text import with_article
from moecc.support.untyped import Json
from moecc.types import Array, DType, Shape, TensorType

# Names, axes, and what MaxText does to queries.
#
# Kernels are stored with their inputs first, layers that are scanned along axis 1, experts along
# axis 0 (MaxText 0.2.5, ``checkpoint_conversion/utils/param_mapping.py``).

MARKS = (("decoder", "decoder_norm", "scale"),)
"""An array that every such decoder has."""

_LAYER = re.compile(r"layers(?:_(\d{1,5}))?", re.ASCII)

_VECTORS: Mapping[tuple[str, ...], str] = {
    ("pre_self_attention_layer_norm", "scale"): "input_layernorm.weight",
    ("post_self_attention_layer_norm", "scale"): "post_attention_layernorm.weight",
    ("self_attention", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("self_attention", "key_norm", "scale"): "self_attn.k_norm.weight",
}
_HEADS = {"query": "q", "key": "k", "value": "v"}
_MATRICES = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
_BLOCKS = {"moe_block", "MoeBlock_0"}


@dataclass(frozen=True)
class _MaxTextDecoder:
    family: type[ModelConfig]
    facts: MaxTextFacts
    head_dim: int
    layers: int
    experts: int
    vocab: int
    turned: bool


def maxtext_pieces(tree: Tree, config: Json, problems: Problems) -> dict[str, ArrayPiece]:
    """Return the tensors of the model by their Hugging Face names; what is unknown is reported."""
    decoder = _decoder(config, problems)
    pieces: dict[str, ArrayPiece] = {}
    if decoder is None:
        return pieces
    for path, key in tree.below(MARKS).items():
        rank = len(tree.arrays.shape(key))
        tensors = dict(_pieces(path, key, rank, decoder))
        if not tensors:
            family = with_article(decoder.family.model_type)
            problems.add(
                f"moecc does not know this array of {family} of MaxText",
                where=f"{tree.folder}, array {quoted('.'.join(path))}",
                hint="export it with MaxText's to_huggingface, or write a .moe graph over the "
                "arrays: docs/adding-a-family.md",
            )
        pieces.update(tensors)
    return pieces


def _decoder(config: Json, problems: Problems) -> _MaxTextDecoder | None:
    families = {name: c for name, c in CONFIGS.items() if c.maxtext is not None}
    family = families.get(str(config.get("model_type")))
    if family is None or family.maxtext is None:
        problems.add(
            "moecc reads other families of MaxText than this",
            where="config.json: model_type",
            expected=" or ".join(families),
            found=str(config.get("model_type")),
            hint="export it with MaxText's to_huggingface",
        )
        return None
    heads = _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim") or _size(config, "hidden_size") // max(heads, 1)
    experts = _size(config, "num_local_experts") or _size(config, "num_experts")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
    layers, vocab = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
    turned = kind == "llama3"
    return _MaxTextDecoder(family, family.maxtext, head_dim, layers, experts, vocab, turned)


def _size(config: Json, key: str) -> int:
    size = config.get(key)
    return size if type(size) is int and 0 < size < 1 << 26 else 0


def _pieces(path: tuple[str, ...], key: str, rank: int, decoder: _MaxTextDecoder) -> NamedPieces:
    match path:
        case ("token_embedder", "embedding"):
            yield (
                "model.embed_tokens.weight",
                ArrayPiece(key, (0,), (1,), limit=decoder.vocab or None),
            )
        case ("decoder", "decoder_norm", "scale"):
            yield "model.norm.weight", ArrayPiece(key, (0,))
        case ("decoder", "logits_dense", "kernel"):
            yield "lm_head.weight", ArrayPiece(key, (1,), (0,), limit=decoder.vocab or None)
        case ("decoder", stack, *inner) if named := _LAYER.fullmatch(stack):
            is_scanned = named[1] is None
            layers = range(decoder.layers) if is_scanned else (int(named[1]),)
            for name, piece in _layer(tuple(inner), key, rank - is_scanned, decoder):
                for layer in layers:
                    tensor = f"model.layers.{layer}.{name}"
                    yield tensor, piece.of_layer(layer) if is_scanned else piece


def _layer(path: tuple[str, ...], key: str, rank: int, decoder: _MaxTextDecoder) -> NamedPieces:
    """Yield the tensors of one layer that an array without an axis of layers has."""
    facts, names = decoder.facts, decoder.family.names
    match path, rank:
        case _, 1 if path in _VECTORS:
            yield _VECTORS[path], ArrayPiece(key, (0,))
        case ("self_attention", ("query" | "key" | "value") as part, "kernel"), 3:
            halves = decoder.turned and part != "value"
            folded = facts.folds_scale and part == "query"
            scale = sqrt(decoder.head_dim) if folded else 1.0
            name = f"self_attn.{_HEADS[part]}_proj.weight"
            yield name, ArrayPiece(key, (1, 2), (0,), halves=halves, scale=scale)
        case ("self_attention", ("query" | "key" | "value") as part, "bias"), 2 if facts.biases:
            yield f"self_attn.{_HEADS[part]}_proj.bias", ArrayPiece(key, (0, 1))
        case ("self_attention", "out", "kernel"), 3:
            yield "self_attn.o_proj.weight", ArrayPiece(key, (2,), (0, 1))
        case ("mlp", matrix, "kernel"), 2 if matrix in _MATRICES:
            yield f"mlp.{_MATRICES[matrix]}_proj.weight", ArrayPiece(key, (1,), (0,))
        case (block, "gate", "kernel"), 2 if block in _BLOCKS:
            yield names.sparse + names.router, ArrayPiece(key, (1,), (0,))
        case (block, matrix), 3 if block in _BLOCKS and matrix in _MATRICES:
            word = names.matrix(_MATRICES[matrix])
            for expert in range(decoder.experts):
                prefix = names.sparse + names.expert.format(expert=expert)
                yield f"{prefix}{word}.weight", ArrayPiece(key, (2,), (1,), at={0: expert})


# The tree that MaxText restores: a step with the arrays of each tensor, layers scanned.

STEP = "0"
ITEM = "items"
SETTINGS = "maxtext.yml"
_BLOCK = "layers"
_TOP = (
    ("token_embedder", "embedding"), ("decoder", "decoder_norm", "scale"),
    ("decoder", "logits_dense", "kernel"),
)  # fmt: skip
_ROPES = {"default": "default", "llama3": "llama3.1"}
_DECODERS = {"llama": "llama2"}
"""MaxText's names of decoders, where they are not those of the family."""
_MOE_BLOCKS = {"mixtral": "MoeBlock_0"}


@dataclass(frozen=True)
class MaxTextArray:
    """An array of the tree.

    Attributes:
      path: its keys.
      shape: its sizes, layers along axis 1.
      dtype: its element type.
      pieces: the tensors that it is made of.
    """

    path: tuple[str, ...]
    shape: Shape
    dtype: DType
    pieces: Mapping[str, ArrayPiece]


def maxtext_arrays(config: ModelConfig, tensors: Mapping[str, TensorType]) -> list[MaxTextArray]:
    """Return the arrays that MaxText stores a model in.

    Args:
      config: its config.
      tensors: the types of its tensors, by their Hugging Face names.

    Raises:
      InputError: MaxText computes another function, or has no array for a tensor; all problems.
    """
    raise_problems(_unstorable(config))
    problems = Problems()
    decoder = _decoder(config.to_json(), problems)
    problems.raise_if_any()
    assert decoder is not None, "an unknown family is a problem"
    arrays = [
        array
        for path, rank in _paths(config)
        if (array := _array(path, rank, decoder, tensors, problems)) is not None
    ]
    stored = {name for array in arrays for name in array.pieces}
    for name in tensors:
        if name not in stored:
            problems.add("MaxText has no array for this tensor", where=name)
    problems.raise_if_any()
    return arrays


def _unstorable(config: ModelConfig) -> Iterator[Problem]:
    """Yield what the decoders of MaxText do not compute."""
    if not isinstance(config, DecoderConfig) or config.maxtext is None:
        families = ", ".join(name for name, c in CONFIGS.items() if c.maxtext is not None)
        yield Problem("MaxText has no decoder of this family that moecc writes", "model_type",
                      families, config.model_type, "convert it to one of them first")  # fmt: skip
        return
    if config.rope.type not in _ROPES:
        yield Problem("MaxText has no rotary positions of this type", "rope_scaling",
                      " or ".join(_ROPES), config.rope.type)  # fmt: skip
    if any(config.sliding_windows):
        yield Problem("MaxText's decoder of this family has no window", "sliding_window",
                      "null", str(config.sliding_windows[0]))  # fmt: skip
    if config.hidden_act != "silu":
        yield Problem("another activation than MaxText's", "hidden_act", "silu", config.hidden_act)


def _paths(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the keys of every array that may be there, and its rank without an axis of layers."""
    yield from ((path, 1 if path[-1] == "scale" else 2) for path in _TOP)
    block = _MOE_BLOCKS.get(config.model_type, "moe_block")
    inner = [(path, 1) for path in _VECTORS]
    for part in _HEADS:
        inner += [(("self_attention", part, "kernel"), 3), (("self_attention", part, "bias"), 2)]
    inner += [(("self_attention", "out", "kernel"), 3), ((block, "gate", "kernel"), 2)]
    for matrix in _MATRICES:
        inner += [(("mlp", matrix, "kernel"), 2), ((block, matrix), 3)]
    yield from ((("decoder", _BLOCK, *path), rank + 1) for path, rank in inner)


def _array(
    path: tuple[str, ...], rank: int, decoder: _MaxTextDecoder, tensors: Mapping[str, TensorType],
    problems: Problems,
) -> MaxTextArray | None:  # fmt: skip
    """Return an array, or None if the model has none of its tensors."""
    pieces = dict(_pieces(path, ".".join(path), rank, decoder))
    missing = [name for name in pieces if name not in tensors]
    if len(missing) == len(pieces):
        return None
    types = {tensors[name] for name in pieces if name in tensors}
    if missing or len(types) > 1:
        stated = f"none named {missing[0]}" if missing else ", ".join(map(str, types))
        problems.add(
            "MaxText stacks these tensors of all layers, which differ",
            where=".".join(path), expected="one type in all layers", found=stated,
        )  # fmt: skip
        return None
    (type,), piece = types, next(iter(pieces.values()))
    sizes: dict[int, int] = {}
    for axes, size in zip((piece.rows, piece.columns), type.shape, strict=False):
        split = (size,) if len(axes) == 1 else (size // decoder.head_dim, decoder.head_dim)
        sizes |= dict(zip(axes, split, strict=True))
    if path[1] == _BLOCK:
        sizes[1] = decoder.layers
    if rank == 4 and path[2] in _BLOCKS:
        sizes[0] = decoder.experts
    return MaxTextArray(path, tuple(sizes[axis] for axis in range(rank)), type.dtype, pieces)


def write_maxtext(
    folder: Path, config: ModelConfig, arrays: list[MaxTextArray], read: Callable[[str], Array]
) -> None:
    """Write the step of a tree by Orbax, and beside it the settings of MaxText's model.

    Arrays lie in files of a temporary folder meanwhile, so that the model may be larger than the
    memory.

    Args:
      folder: an existing folder.
      config: the config of the model.
      arrays: its arrays.
      read: returns a tensor by its Hugging Face name.
    """
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    with TemporaryDirectory(dir=folder) as scratch:
        for number, array in enumerate(arrays):
            # Orbax knows arrays of NumPy alone: of a mapped file this is a view.
            mapped = np.memmap(f"{scratch}/{number}", array.dtype.numpy, "w+", shape=array.shape)
            for name, piece in array.pieces.items():
                piece.write(mapped, read(name))
            *outer, last = array.path
            branch = tree
            for key in outer:
                branch = branch.setdefault(key, {})
            branch[last] = mapped.view(np.ndarray)
        state = {"step": np.int32(0), "params": {"params": tree}, "opt_state": {}}
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(folder / STEP / ITEM, state)
        tree.clear()
    lines = [f"{key}: {value}\n" for key, value in _settings(config).items()]
    (folder / SETTINGS).write_text("".join(lines))


def _settings(config: ModelConfig) -> dict[str, str]:
    """Return the settings of MaxText that a config decides, by their names in its ``base.yml``."""
    assert isinstance(config, DecoderConfig), "other families were rejected"
    mixture = config if isinstance(config, MoeConfig) else None
    width = config.intermediate_size if mixture is None else mixture.expert_intermediate_size
    settings: dict[str, object] = {
        "decoder_block": quoted(_DECODERS.get(config.model_type, config.model_type)),
        "base_emb_dim": config.hidden_size,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads,
        "base_num_decoder_layers": config.num_hidden_layers,
        "base_mlp_dim": width,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "mlp_activations": '["silu", "linear"]',
        "normalization_layer_epsilon": config.rms_norm_eps,
        "rope_max_timescale": config.rope.theta,
        "rope_type": quoted(_ROPES[config.rope.type]),
        "logits_via_embedding": config.tie_word_embeddings,
        "use_qk_norm": config.qk_norm,
        "attention_bias": config.qkv_bias,
        "enable_dropout": False,
        "scan_layers": True,
    }
    if mixture is not None:
        settings |= {
            "num_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.experts_per_token,
            "base_moe_mlp_dim": width,
            "norm_topk_prob": mixture.norm_topk_prob,
        }
    return {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in settings.items()}
