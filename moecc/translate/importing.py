"""Import an opened checkpoint as a graph, after checking every tensor against the config."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from moecc.errors import InputError, Problem, nearest, printable
from moecc.families.building import build_model
from moecc.families.config import FUSED_GATE_UP, ModelConfig
from moecc.families.heads import head_biases, head_modules, stated_head
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, parse_config
from moecc.formats.source import Checkpoint, TensorInfo
from moecc.ir.graph import Graph
from moecc.support.text import capped, ranges
from moecc.types import F32, DType, TensorType
from moecc.weights.arithmetic import BASE, branch_and_name
from moecc.weights.expr import Expr, Source, source_types, transform

# Facts that importing needs of any config: depth, experts, layer names on disk.

_LAYER = re.compile(
    r"(?:(?:model\.)?(?P<stack>encoder|decoder)\.(?:block|layers)|(?:\w+\.)*?(?:layers|layer|blocks|h))"
    r"\.(?P<n>\d{1,6})\."
)


def layer_of(name: str) -> tuple[str, int] | None:
    """Return stack and number of the layer that a tensor belongs to, or None.

    The stack is ``encoder`` or ``decoder`` with a space after it, or empty where there is but one.
    """
    match = _LAYER.match(name)
    if match is None:
        return None
    stack = match["stack"]
    return (f"{stack} " if stack else ""), int(match["n"])


# Names on disk that differ from a family's own by a prefix.
#
# A model of transformers saved with a head has its tensors under a prefix (``bert.``), and a base
# model saved alone lacks that of its class (``transformer.`` in a gpt2).  The rest of moecc knows
# one name for each tensor; here it becomes that of the file.

_OLDER = (
    (".LayerNorm.weight", ".LayerNorm.gamma"),
    (".LayerNorm.bias", ".LayerNorm.beta"),
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
)
_PROBES = (
    "embeddings.LayerNorm.weight",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
)
"""Tensors that tell whether a file has the older names."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """The difference between a family's names and those of a file.

    Attributes:
      lacking: a prefix that names of the file lack.
      added: a prefix that the base model's names have in the file.
      older: whether norms have the names that the first of BERT's checkpoints gave them, and
        weights that are stored as directions and lengths those of the first of wav2vec2's.
      apart: the prefixes of a head, which has the same names in every file.
      tower: the prefix of all of the model's tensors, if the file has further models.
    """

    lacking: str = ""
    added: str = ""
    older: bool = False
    apart: tuple[str, ...] = ()
    tower: str = ""

    def __call__(self, name: str) -> str:
        """Return the name in the file of the tensor that the family calls `name`."""
        for word, before in _OLDER if self.older else ():
            if name.endswith(word):
                name = name.removesuffix(word) + before
        if self.apart and name.startswith(self.apart):
            return name
        return f"{self.added}{name.removeprefix(self.lacking)}"

    def is_beside(self, name: str) -> bool:
        """Whether a tensor of the file is no part of the base model: of a head, say."""
        return not name.startswith(self.added or self.tower)

    def read_by(self, graph: Graph) -> None:
        """Let the parameters of `graph` read the tensors under their names in the file."""
        if self == StoredNames(apart=self.apart, tower=self.tower):
            return
        for value in graph.params.values():
            if value.weight is not None:
                value.weight = transform(value.weight, self._renamed)

    def _renamed(self, expr: Expr) -> Expr:
        return Source(self(expr.name), expr.type) if isinstance(expr, Source) else expr


def stored_names(config: ModelConfig, tensors: Container[str]) -> StoredNames:
    """Return how the names of the file with `tensors` differ from those of the family."""
    candidates = [StoredNames()]
    if config.base_prefix:
        candidates.append(StoredNames(lacking=config.base_prefix))
    if config.head_prefix:
        candidates.append(StoredNames(added=config.head_prefix))
    steps = [step for steps in config.stated_heads().values() for step in steps]
    firsts = {f"{module.partition('.')[0]}." for module in head_modules(steps)}
    of_base = {"pooler."} if "" in config.stated_heads() else set()
    apart = tuple(sorted(firsts - of_base - {config.base_prefix}))
    stored = next(
        (names for names in candidates if names(config.first_tensor) in tensors), candidates[0]
    )
    tower = "" if stored.lacking else config.tower_prefix
    stored = replace(stored, apart=apart, tower=tower)
    older = replace(stored, older=True)
    is_older = any(stored(n) not in tensors and older(n) in tensors for n in _PROBES)
    return older if is_older else stored


_EXPERT = re.compile(r"(.+\.experts\.)(?:expert_)?\d{1,6}(\.\w+\.weight)", re.DOTALL)
_IDLE = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|(.*\.)?position_ids"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    r"|(\w+\.)?(embeddings\.mask_token|masked_spec_embed)|(.*\.)?relative_position_index"
    r"|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
    r"|gpt_neox\.layers\.\d+\.attention\.(masked_)?bias",
    re.DOTALL,
)
"""Buffers, embeddings of what training masks, and a table that T5 stored and never used."""


def _is_unread(config: ModelConfig, name: str) -> bool:
    """Whether hidden states do not depend on a tensor of the base model, say of its pooler."""
    if re.fullmatch(config.unread, name.removeprefix(config.base_prefix)):
        return True
    modules = head_modules(config.stated_heads().get("", ()))
    module = name.removeprefix(config.head_prefix).rpartition(".")[0]
    return bool({module, f"{config.base_prefix}{module}"} & set(modules))


def _predicts_further(config: ModelConfig, name: str, tensors: Container[str]) -> bool:
    """Whether a tensor is of a layer after the last, whose first matrix joins state and token."""
    layer = layer_of(name)
    if layer is None or not config.has_further_layers or layer[1] < config.layers(""):
        return False
    return f"{config.names.layer.format(layer=layer[1])}eh_proj.weight" in tensors


_BIAS_KEYS = {"self_attn": "attention_bias (qkv_bias in qwen2_moe)", "mlp": "mlp_bias"}
_BLOCK_ROWS = 4096


def import_checkpoint(
    checkpoint: Checkpoint, *, padding: bool | None = False, heads: bool | None = False
) -> Graph:
    """Return the graph of `checkpoint`, whose parameters read its tensors.

    With `padding` the graph of an encoder has an input ``mask``; with None where it can.
    With `heads` it has the head that the config names, where the tensors are there; with None the
    head of a task, and no pooler alone.

    Names, shapes and element types are all checked against the config before any weight is read;
    the only weights ever read here are those of an output matrix beside tied embeddings, to see
    whether the two are one.

    Raises:
      InputError: the config is invalid, or the tensors do not match it; all problems at once.
      MachineError: the system cannot read a file.
    """
    tensors = checkpoint.tensors
    is_folder = checkpoint.format == "safetensors"
    where = str(checkpoint.path / "config.json" if is_folder else checkpoint.path)
    config = parse_config(checkpoint.config, where).fitted(tensors)
    _check_magnitude(config, tensors, str(checkpoint.path))
    stored = stored_names(config, tensors)

    def dtype_of(name: str) -> DType:
        info = tensors.get(stored(name))
        return F32 if info is None else info.dtype

    layout = _layout(config, tensors)
    problems = list(_mixed_stacks(config, layout, tensors))
    # Experts of several types cannot be stacked, but the other problems are still to be found.
    types = None if problems else dtype_of
    shapes = {name: info.shape for name, info in tensors.items()}
    stated = config.stated_heads()
    steps = stated if heads else {} if heads is False else {t: s for t, s in stated.items() if t}
    head = stated_head(steps, checkpoint.config, shapes, stored)
    graph = build_model(
        config, types, str(checkpoint.path), layout=layout, padding=padding, head=head
    )
    stored.read_by(graph)
    expected = source_types(graph.weights.values())
    base = {n: i for n, i in tensors.items() if n in expected or not stored.is_beside(n)}
    problems.extend(_problems(config, expected, base))
    if problems:
        path = str(checkpoint.path)
        raise InputError(
            replace(problem, where=f"{path}: {problem.where}" if problem.where else path)
            for problem in problems
        )
    head_copy = [config.names.head] if checkpoint.states_tie else []
    for name in dict.fromkeys([*_repeated(config), *head_copy]):
        if name in tensors:
            embedding = stored(config.names.embedding)
            _check_repeated(name, embedding, config, checkpoint)
    return graph


def unread_tensors(graph: Graph, checkpoint: Checkpoint) -> list[str]:
    """Return the tensors of the model that are not part of the graph, copies of others left out.

    Statistics and tensors of further models beside it are read by passes alone.
    """
    read = set(source_types(graph.weights.values()))
    family = CONFIGS.get(graph.family, ModelConfig)
    names = family.names
    read.update((names.head, *names.copies))
    of_model = (n for n in checkpoint.tensors if branch_and_name(n)[0] == BASE)
    return [n for n in of_model if n not in read and not _IDLE.fullmatch(n)]


def readable_head(checkpoint: Checkpoint) -> tuple[str, frozenset[str]]:
    """Return the task and the tensors of the head that `import_checkpoint` reads with `heads`.

    There are none of a checkpoint without a head, and of a head that the family does not know.
    """
    if not CONFIGS.get(str(checkpoint.config.get("model_type")), ModelConfig).head_steps:
        return "", frozenset()
    config = parse_config(checkpoint.config).fitted(checkpoint.tensors)
    stored = stored_names(config, checkpoint.tensors)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    head = stated_head(config.stated_heads(), checkpoint.config, shapes, stored)
    if head is None:
        return "", frozenset()
    names = [f"{m}.weight" for m in head_modules(head.steps)] + head_biases(head.steps)
    return head.task, frozenset(map(stored, names))


def _repeated(config: ModelConfig) -> list[str]:
    """Return the tensors that a file may hold as copies of the embedding."""
    names = config.names
    return [*([names.head] if config.is_tied else []), *names.copies]


def _layout(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> str:
    if config.stacks_experts:
        return "stacked"
    if not isinstance(config, MoeConfig):
        return "experts"
    names = config.names
    usual = f"{names.sparse}{names.expert_gate_up}" == FUSED_GATE_UP
    if not usual and any(name.endswith(f".{FUSED_GATE_UP}") for name in tensors):
        return "fused"
    stacked = f"{names.sparse}{names.stack}{names.down}.weight"
    return "stacked" if any(name.endswith(f".{stacked}") for name in tensors) else "experts"


def _check_magnitude(config: ModelConfig, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Reject a config with far more tensors than the file has, before building its graph."""
    layers = sum(map(config.layers, config.stacks))
    one_by_one = _layout(config, tensors) == "experts" and not config.names.expert_gate_up
    blocks = layers + (config.expert_blocks if one_by_one else 0)
    if blocks <= len(tensors) + 100:
        return
    present = {layer for layer in map(layer_of, tensors) if layer}
    raise InputError(
        "config.json and the tensors cannot belong together",
        where=where,
        expected=f"{layers} layers, with experts {blocks} blocks",
        found=f"{len(tensors)} tensors, in {len(present)} layers",
        hint="check num_hidden_layers and the number of experts",
    )


def _mixed_stacks(
    config: ModelConfig, layout: str, tensors: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    """Yield the matrices whose experts have several element types."""
    if layout != "experts":
        return
    dtypes: dict[str, dict[str, str]] = {}
    for name, info in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            dtypes.setdefault(f"{match[1]}*{match[2]}", {})[str(info.dtype)] = name
    for names, types in dtypes.items():
        if len(types) > 1:
            shown = ", ".join(f"{dtype} ({name})" for dtype, name in types.items())
            fault = "the experts of a layer have several element types"
            yield Problem(fault, names, "one", shown, "convert the checkpoint to one type first")


def _problems(
    config: ModelConfig, expected: Mapping[str, TensorType], tensors: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    head = config.names.head
    allowed = set(_repeated(config))
    missing = [name for name in expected if name not in tensors]
    # Buffers and a pooler may be in a file, and are not part of the graph.
    extra = [
        name
        for name in tensors
        if name not in expected
        and name not in allowed
        and not _is_unread(config, name)
        and not _predicts_further(config, name, tensors)
        and not _IDLE.fullmatch(name)
    ]
    prefix = _common_prefix(missing, extra, head)
    if prefix is not None:
        yield prefix
        missing, extra = [name for name in missing if name == head], []
    yield from _missing(missing, extra, expected, head)
    yield from _extra(extra, missing, config)
    yield from capped(_unfit(expected, tensors), "tensor does not match", "tensors do not match")


def _common_prefix(missing: list[str], extra: list[str], head: str) -> Problem | None:
    """Return a problem that explains all others: the names of a model without its head."""
    bare = {name.removeprefix("model.") for name in missing if name != head}
    if len(bare) < 2 or not bare <= set(extra):
        return None
    return Problem(
        "the tensors are those of a base model: their names lack 'model.'",
        expected=sorted(n for n in missing if n != head)[0],
        found=printable(min(bare)),
        hint="load it with transformers as a causal language model and save it again",
    )


def _missing(
    missing: list[str], extra: list[str], expected: Mapping[str, TensorType], head: str
) -> Iterator[Problem]:
    stacks, single = _whole_layers(missing, expected)
    for stack, layers in stacks.items():
        hint = "the number of layers in config.json, or an incomplete download?"
        yield Problem(f"no tensor of the {stack}layers {ranges(layers)}", "config.json", hint=hint)
    if head in single:
        single.remove(head)
        yield Problem(
            "there is no output matrix, and config.json does not tie it to the embedding",
            head,
            str(expected[head]),
            hint='set "tie_word_embeddings": true if the model ties them',
        )
    # The search for a similar name takes time for each pair of names, so it is bounded.
    candidates = extra[:200]
    problems = (
        Problem("this tensor is missing", name, str(expected[name]), hint=nearest(name, candidates))
        for name in single
    )
    yield from capped(problems, "tensor is missing", "tensors are missing")


def _whole_layers(
    missing: Iterable[str], expected: Iterable[str]
) -> tuple[dict[str, list[int]], list[str]]:
    """Return the layers of each stack that are missing entirely, and the other names."""
    absent = list(missing)
    gone = set(absent)
    present = {layer_of(name) for name in expected if name not in gone}
    absent_layers = {layer for name in absent if (layer := layer_of(name)) and layer not in present}
    stacks: dict[str, list[int]] = {}
    for stack, number in sorted(absent_layers):
        stacks.setdefault(stack, []).append(number)
    return stacks, [name for name in absent if layer_of(name) not in absent_layers]


def _extra(extra: list[str], missing: list[str], config: ModelConfig) -> Iterator[Problem]:
    beyond: dict[str, set[int]] = {}
    for name in extra:
        layer = layer_of(name)
        if layer is not None and layer[1] >= config.layers(layer[0].strip()):
            beyond.setdefault(layer[0], set()).add(layer[1])
    for stack, numbers in beyond.items():
        name = stack.strip()
        yield Problem(
            f"there are tensors of the {stack}layers {ranges(sorted(numbers))}",
            "config.json",
            f"layers below {config.layers_key(name)} = {config.layers(name)}",
        )
    candidates = missing[:200]
    single = (
        name
        for name in extra
        if (layer := layer_of(name)) is None or layer[1] not in beyond.get(layer[0], ())
    )
    problems = (
        Problem(
            f"{config.model_type} has no such tensor",
            printable(name),
            hint=_bias_hint(name) or nearest(name, candidates),
        )
        for name in single
    )
    yield from capped(problems, "tensor is not the model's", "tensors are not the model's")


def _bias_hint(name: str) -> str | None:
    if not name.endswith(".bias"):
        return None
    key = next((key for part, key in _BIAS_KEYS.items() if f".{part}." in name), None)
    return key and f"config.json says that there is no bias: {key}"


def _unfit(
    expected: Mapping[str, TensorType], tensors: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    for name, type in expected.items():
        info = tensors.get(name)
        if info is None:
            continue
        if info.shape != type.shape:
            yield _wrong_shape(name, type, info)
        if not info.dtype.is_float:
            hint = "a quantised checkpoint has to be dequantised first"
            expected_dtype = "a floating-point type"
            yield Problem(
                "the tensor cannot be a weight",
                name,
                expected_dtype,
                str(info.dtype),
                hint,
            )


def _wrong_shape(name: str, type: TensorType, info: TensorInfo) -> Problem:
    sizes = ", ".join(map(str, type.axes))
    turned = info.shape == type.shape[::-1]
    hint = "it is transposed: outputs come first on disk" if turned else None
    fault = "the tensor has another shape than config.json says"
    return Problem(fault, name, f"[{sizes}]", str(list(info.shape)), hint)


def _check_repeated(
    name: str, embedding_name: str, config: ModelConfig, checkpoint: Checkpoint
) -> None:
    """Reject a tensor that differs from the embedding of which it should be a copy.

    transformers 4 would drop it, transformers 5 would keep it.
    """
    names = config.names
    head, embedding = checkpoint.tensors[name], checkpoint.tensors[embedding_name]
    where = f"{checkpoint.path}: {name}"
    is_head = name == names.head
    differs = Problem(
        "config.json ties the output matrix to the embedding, and the two differ"
        if is_head
        else "the stack has an embedding that differs from the shared one, which is read for all "
        "stacks, whatever tie_word_embeddings says",
        where,
        f"{embedding.dtype} {list(embedding.shape)}, the content of {embedding_name}",
        f"{head.dtype} {list(head.shape)}",
        'set "tie_word_embeddings": false to keep both, or remove the tensor' if is_head else None,
    )
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        raise InputError([differs])
    for start in range(0, head.shape[0], _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, head.shape[0])
        ours = checkpoint.read(name, start, stop)
        if ours.tobytes() != checkpoint.read(embedding_name, start, stop).tobytes():
            rows = f"a difference in rows {start} to {stop - 1}"
            raise InputError([replace(differs, found=rows)])
