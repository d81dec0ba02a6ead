"""The base of every config, the names of a family's tensors, and its facts in other formats.

Every record here stands in the class of a family's config.  Names of experts are those of one
expert each, the layout that every runtime reads; transformers 5 can also write the experts of a
layer in one tensor, and those names are the same in every family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

from moecc.errors import InputError
from moecc.families.reader import (
    COUNT,
    KEPT_NUMBERS,
    LAYERS,
    NEURONS,
    VOCABULARY,
    WIDTH,
    KeyProblem,
    Reader,
    key_problem,
    one_of,
    read_extra,
    refuse_what_needs_other_code,
    shown,
)
from moecc.families.shrinking import (
    SMALL_HEAD_DIM,
    SMALL_HEADS,
    SMALL_MLP,
    SMALL_VOCAB,
    shrink_size,
)
from moecc.support.untyped import Json, JsonDict

if TYPE_CHECKING:
    from moecc.weights.expr import Expr

FAMILY = "st_moe"
"""The family that can store any graph; see `moecc.families.st_moe`."""

FUSED_ROUTER = "mlp.gate.weight"
FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_DOWN = "mlp.experts.down_proj"
"""The in-memory names of transformers 5, which some tools write to disk unchanged."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a model's tensors; a layer's are relative to `layer`.

    Attributes:
      embedding: the token embedding, ``[vocab, embed]``; of images, the token of the whole.
      final_norm: the scale of the last norm.
      head: the output matrix, if it is not the embedding.
      layer: the prefix of a layer's tensors.
      dense: the prefix of a dense feed-forward block.
      sparse: the prefix of a mixture of experts.
      router: the router's matrix, after `sparse`.
      expert: the prefix of one expert, after `sparse`.
      stack: the prefix of the stacked experts as the graph calls them, after `sparse`.
      gate, up, down: the three matrices of an expert.
      single: the first matrix if there is no gate; empty if it has the name of `up`.
      qkv: the one matrix of queries, keys and values, in this order; empty if there are three.
      qkv_by_group: whether it has for each key head its queries, its key and its value.
      gate_up: the one matrix of gate and up, in this order; empty if there are two.
      copies: further names of the embedding, which some files contain and transformers may expect.
      shared: the prefix of a shared expert, after `sparse`.
      shared_gate: the shared expert's gate, ``[1, embed]``, after `sparse`.
      routing_bias: the bias in the choice of experts, ``[expert]``, after `sparse`.
      routing_bias_rows: whether that has a first axis of size 1 on disk.
      expert_gate_up, expert_down: tensors of all experts of a layer, gate and up in one, after
        `sparse`; empty if every expert has its own.
      inputs_first: whether those have their inputs first.
      in_turns: whether gate and up alternate in the tensor of both; else they are its halves.
      pairs_neighbours: whether rows of queries and keys are ordered on disk so that the rotary
        embedding rotates neighbours.
      attention: the prefix of the attention.
      attention_output: the last matrix of the attention.
      query_norm, key_norm: the norms of queries and keys; with ``{head}`` each head has a tensor.
      dense_gate, dense_up, dense_down: the matrices of a dense block.
      convolution: the prefix of a short convolution.
      delta: the prefix of a gated delta rule.
      delta_by_group: whether its projections are two matrices, which have for each key head its
        query, key, values and gates, and its rates and decays; else they are five by kind.
      layer_norms: the norms before and after the attention, and before and after the feed-forward
        block; empty if they have their usual names.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    dense: str = "mlp."
    sparse: str = "mlp."
    router: str = "gate.weight"
    expert: str = "experts.{expert}."
    stack: str = "experts."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert."
    shared_gate: str = "shared_expert_gate.weight"
    single: str = ""
    qkv: str = ""
    gate_up: str = ""
    copies: tuple[str, ...] = ()
    routing_bias: str = "gate.e_score_correction_bias"
    routing_bias_rows: bool = False
    expert_gate_up: str = ""
    expert_down: str = ""
    inputs_first: bool = False
    in_turns: bool = False
    pairs_neighbours: bool = False
    attention: str = "self_attn."
    attention_output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    convolution: str = "conv."
    delta: str = "linear_attn."
    delta_by_group: bool = False
    dense_gate: str = "gate_proj"
    dense_up: str = "up_proj"
    dense_down: str = "down_proj"
    layer_norms: tuple[str, ...] = ()
    qkv_by_group: bool = False

    def matrix(self, name: str, is_gated: bool = True) -> str:
        """Return the name of the matrix ``gate``, ``up`` or ``down`` of an expert."""
        if name == "up" and not is_gated:
            return self.single or self.up
        return {"gate": self.gate, "up": self.up, "down": self.down}[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames(TensorNames):
    """The names of a model with layer norms and biases: GPT-2, BERT, ViT and their kin.

    Attributes:
      norms: the norms of attention and feed-forward block.
      query, key, value, output: the projections of the attention.
      fc_in, fc_out: the matrices of the feed-forward block.
      positions: the learned positions; empty if there are none.
      narrow: the projections from and to narrower embeddings.
      by_head: whether queries, keys and values lie together for each head, not each by itself.
      around: the norms before and behind all layers; empty if there are none.
      gated_out: the second matrix of a gated block, whose first is `gate_up`.
      scales: the vectors that what a block adds is multiplied by; empty if there are none.
    """

    norms: tuple[str, str]
    output: str
    fc_in: str
    fc_out: str
    query: str = ""
    key: str = ""
    value: str = ""
    positions: str = ""
    narrow: tuple[str, str] = ("", "")
    around: tuple[str, str] = ("", "")
    by_head: bool = False
    gated_out: str = ""
    scales: tuple[str, ...] = ()

    def projections(self, prefix: str) -> list[str]:
        """Return the names of the projections of the attention of a layer."""
        return [f"{prefix}{name}" for name in (self.query, self.key, self.value, self.output)]


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What llama.cpp computes of a family, and how its files state it beyond the config.

    Attributes:
      architecture: ``general.architecture``.
      pairs_neighbours: whether the rows of queries and keys are stored so that the rotary
        embedding rotates neighbours, where Hugging Face rotates halves of a head.
      output_bias: whether it reads a bias of the attention's output projection.
      mlp_bias: whether it reads biases of feed-forward blocks.
      ffn_norm: the norm before a feed-forward block.
      final_norm: the last norm.
      window_period: where layers have the window that a key states: all but every so many; 0 where
        none has.
      score_layers: where scores are divided by √`query_pre_attn_scalar`, which no key states: that
        is the width of a head, but in a model of so many layers the share of a head in the width.
      is_tied: whether the output matrix always is the embedding.
      reads_divisors: whether it reads divisors of rotary frequencies, those of Llama 3's scaling,
        though it rotates halves of a head.
      unread_ropes: the kinds of rotary positions that it ignores or refuses.
      no_rope_step: which layers have no rotary positions: every so many; 0 if none.
      keys: further keys of the architecture, with those of config.json that say the same.
      optional_keys: keys that a file need not state, with those of config.json, and their value
        then.
      local_theta: the base period of the rotary embedding in layers with a window, if no key states
        one; 0 where it is that of all layers.
      fixed: keys of the architecture with the one value that they have.
      has_groups: whether there may be fewer key-value heads than query heads.
      fills_width: whether heads together have to have the model's width.
      needs_head: whether it wants an output matrix even where it is the embedding.
      needs_routing_bias: whether it wants biases of the choice even where they are zeros.
      renormalises: whether it divides the chosen gates by their sum; None: a key says it.
      states: keys of config.json that no key of a file has, with the one value that llama.cpp
        computes with.
    """

    architecture: str
    pairs_neighbours: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    ffn_norm: str = "ffn_norm"
    final_norm: str = "output_norm"
    window_period: int = 0
    score_layers: int = 0
    is_tied: bool = False
    reads_divisors: bool = False
    unread_ropes: tuple[str, ...] = ()
    no_rope_step: int = 0
    keys: tuple[tuple[str, str], ...] = ()
    optional_keys: tuple[tuple[str, str, object], ...] = ()
    local_theta: float = 0.0
    fixed: tuple[tuple[str, int | float], ...] = ()
    has_groups: bool = True
    fills_width: bool = False
    needs_head: bool = False
    needs_routing_bias: bool = False
    renormalises: bool | None = True
    states: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class MaxTextFacts:
    """How MaxText stores a family.

    Attributes:
      folds_scale: whether queries are divided by the root of the width of a head.
      biases: whether the projections to queries, keys and values may have biases.
    """

    folds_scale: bool = False
    biases: bool = False


@dataclass(frozen=True, slots=True)
class EngineReading:
    """The conditions under which an engine reads a family, by the words of `CONDITIONS`.

    Attributes:
      needs: without these it refuses the checkpoint.
      silent: without these it loads it and computes another function.
      never: why it refuses all of moecc's checkpoints of the family; empty if it may read some.
      differs: what it computes otherwise in all of them, without an error; empty if it may not.
    """

    needs: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    never: str = ""
    differs: str = ""


# The base of every config: from its fields follow reading, writing and checks.

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}
"""Names of activations in configs, and moecc's name for each function."""

DTYPES = ("float32", "float16", "bfloat16", "float64")

Only = Mapping[str, tuple[object, str]]
"""Keys with the one value that is supported, and why others are not."""

CAUSAL: Only = {"is_causal": (True, "every token of such a decoder attends to later ones, too")}
"""Of decoders: any value that Python takes for false switches the mask off in transformers 5."""

FILLED: Only = {"head_dim": (None, "the heads of this family fill its width")}
"""Of families without the key, whose code in transformers 5 reads it all the same."""

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class KeyRule:
    """How a field is read from config.json and written to it, see `ModelConfig.key`.

    Attributes:
      kind: ``size``, ``number``, ``flag``, ``choice`` or ``activation``.
      least: the least size or number.
      above: a number that has to be exceeded.
      most: the largest size.
      choices: the values of a choice.
      null: what null stands for, given the fields that were read before.
    """

    kind: str
    least: float | None = None
    above: float | None = None
    most: int = 0
    choices: tuple[str, ...] = ()
    null: Callable[[Json], object] | None = None

    def read(self, reader: Reader, key: str, values: Json) -> object:
        """Return the value at `key`; what is wrong is recorded by `reader`."""
        if self.null is not None and reader.value(key) is None:
            return self.null(values)
        match self.kind:
            case "size":
                return reader.size(key, self.most, smallest=int(self.least or 0))
            case "number":
                return reader.number(key, least=self.least, above=self.above)
            case "flag":
                return reader.flag(key)
            case "choice":
                return reader.choice(key, self.choices)
        return ACTIVATIONS[reader.choice(key, ACTIVATIONS)]

    def problem(self, value: Any, key: str) -> KeyProblem | None:
        """Return why a field cannot have `value`, or None."""
        if self.kind == "size" and not (self.least or 0) <= value <= self.most:
            return key_problem("not a usable size", f"1 to {self.most:,}", f"{value}", key)
        if self.kind == "activation" and value not in ACTIVATIONS.values():
            return key_problem("unknown activation", one_of(set(ACTIVATIONS.values())), value, key)
        if self.kind == "choice" and value not in self.choices:
            return key_problem("not supported", one_of(self.choices), f"{value}", key)
        if self.kind == "number" and self.least is not None and value < self.least:
            return key_problem("too small", f"at least {self.least:g}", f"{value}", key)
        return None


def _with_rule(default: object, rule: KeyRule | None, feature: str = "") -> Any:
    return field(default=default, metadata={"rule": rule, "feature": feature})


def size(
    most: int,
    *,
    least: int = 1,
    null: Callable[[Json], object] | None = None,
    default: object = MISSING,
) -> Any:
    """Declare a field that is a size up to `most`; `null` says what null stands for."""
    return _with_rule(default, KeyRule("size", least, most=most, null=null))


def number(
    *,
    least: float | None = None,
    above: float | None = None,
    null: Callable[[Json], object] | None = None,
    default: object = MISSING,
) -> Any:
    """Declare a field that is a finite number, at least `least` or greater than `above`.

    `null` says what null stands for.
    """
    return _with_rule(default, KeyRule("number", least, above, null=null))


def flag(*, null: Callable[[Json], object] | None = None, default: object = MISSING) -> Any:
    """Declare a field that is true or false; `null` says what null stands for."""
    return _with_rule(default, KeyRule("flag", null=null))


def choice(choices: tuple[str, ...], *, default: object = MISSING) -> Any:
    """Declare a field with one of `choices`."""
    return _with_rule(default, KeyRule("choice", choices=choices))


def activation(*, default: object = MISSING) -> Any:
    """Declare a field that is the activation of feed-forward blocks, by moecc's name."""
    return _with_rule(default, KeyRule("activation"))


def feature(words: str, rule: KeyRule | None = None, *, default: object = MISSING) -> Any:
    """Declare a feature that most families lack; it is read where `ModelConfig.options` has it.

    Args:
      words: what it is, in a message: "llama has no …".
      rule: how it is read; None if the family does so itself.
      default: the value without the feature.
    """
    return _with_rule(default, rule, words)


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    field_specifiers=(Field, field, size, number, flag, choice, activation, feature),
)
def config_class(cls: type[Config]) -> type[Config]:
    """Make a class derived from `ModelConfig` a frozen dataclass, its fields given by name.

    ``dataclass(frozen=True, kw_only=True)`` does the same, and compiles functions of all fields,
    some 46, for each of 49 families, which takes a sixth of the time to inspect a small model.
    `ModelConfig` has them for whatever fields there are.
    """
    return dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)(cls)


@config_class
class ModelConfig:
    """A model of any family; sizes count elements.

    A class of a family states its deviations from the shape of its base, and what every format
    and engine makes of it.  Tables of the bases hold for it, too.

    Raises InputError on construction if the values are inconsistent or the family
    cannot express them.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    # The module of `moecc.families.graphs` that builds graphs of the shape.
    graphs: ClassVar[str] = ""
    # Of a family from outside: what builds its graphs.
    builder: ClassVar[Callable[..., Any] | None] = None
    # The names of its runs of layers: of one alone, the empty one.
    stacks: ClassVar[tuple[str, ...]] = ("",)
    # What the model is, in messages.
    kind: ClassVar[str] = "an encoder alone"
    # Other names that the class in `architectures` has had.
    aliases: ClassVar[tuple[str, ...]] = ()
    # The defaults of transformers, by key.
    defaults: ClassVar[Mapping[str, object]]
    # The key of a field in config.json, where it has another name; empty if it has none.
    keys: ClassVar[Mapping[str, str]] = {}
    # Fields whose null transformers rejects.
    strict: ClassVar[tuple[str, ...]] = ()
    # Fields that have the same value in every model of the family.
    fixed: ClassVar[Mapping[str, object]] = {}
    # Features that the family leaves open.
    options: ClassVar[frozenset[str]] = frozenset()
    # Keys of which moecc supports one value, and why others are rejected.
    only: ClassVar[Only] = {}
    # Keys that change nothing in the graph, and are not kept.
    idle: ClassVar[tuple[str, ...]] = ()
    # Keys that are written with the same value in every model.
    always: ClassVar[Mapping[str, object]] = {}
    # Keys that set another one in transformers, whose value they replace.
    synonyms: ClassVar[Mapping[str, str]] = {}
    # Numbers that an export keeps with their default if the file omits them.
    kept_numbers: ClassVar[tuple[str, ...]] = KEPT_NUMBERS
    names: ClassVar[TensorNames] = TensorNames()
    gguf: ClassVar[GgufFacts | None] = None
    maxtext: ClassVar[MaxTextFacts | None] = None
    # How each engine reads the family; of families without experts nothing is stated.
    engines: ClassVar[Mapping[str, EngineReading]] = {}
    # Whether code named after the family, which its first checkpoints bring, is in transformers.
    own_code: ClassVar[bool] = False
    # What the modules of that code are named after, where it is not the family.
    code_name: ClassVar[str] = ""
    # Whether files may hold layers after the last that predict further tokens.
    has_further_layers: ClassVar[bool] = False
    # The prefix of the base model's tensors, which files of it alone lack.
    base_prefix: ClassVar[str] = ""
    # The prefix of the tensors in files that hold another model beside it; empty if none do.
    tower_prefix: ClassVar[str] = ""
    # The prefix that the tensors have in files of a model with a head.
    head_prefix: ClassVar[str] = ""
    # Whether classes of the family with a head are read, too, without it.
    with_heads: ClassVar[bool] = False
    # The heads that files may hold, by their tasks: the steps of `moecc.families.heads`.
    head_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # A pattern of tensors that files may hold and hidden states do not depend on.
    unread: ClassVar[str] = ""
    # Whether its graph may have a mask of padding, and a word for those who ask in vain.
    takes_mask: ClassVar[bool] = False
    mask_hint: ClassVar[str | None] = None
    # Whether files have the experts of a matrix as one tensor, and never one by one.
    stacks_experts: ClassVar[bool] = False

    vocab_size: int = size(VOCABULARY, default=0)
    dtype: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    def __init__(self, **values: object) -> None:
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            value = values.pop(f.name, self.fixed.get(f.name, default))
            if value is MISSING:
                raise TypeError(f"{type(self).__name__}: the field {f.name!r} is missing")
            object.__setattr__(self, f.name, value)
        if values:
            raise TypeError(f"{type(self).__name__} has no field {next(iter(values))!r}")
        self.__post_init__()

    def __repr__(self) -> str:
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{type(self).__qualname__}({values})"

    def __eq__(self, config: object) -> bool:
        if type(self) is not type(config):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(config, f.name) for f in fields(self))

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self) if f.hash is not False))

    def __post_init__(self) -> None:
        problems = list(self.checks())
        if problems:
            name = type(self).__name__
            raise InputError(
                replace(problem, where=f"{name}: {problem.where}") for problem in problems
            )

    def shrunk(self) -> ModelConfig:
        """Return the same structure at small sizes, see `moecc.families.shrinking`.

        Raises:
          InputError: the config holds a graph, whose sizes only its own constraints determine.
        """
        return replace(self, **self.small_sizes())

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        raise InputError("the config holds no sizes")

    def small_vocabulary(self) -> JsonDict:
        """Return the fields of a smaller vocabulary, which may be without the padding token."""
        extra = {**self.extra, "pad_token_id": None}
        return {"vocab_size": shrink_size(self.vocab_size, SMALL_VOCAB), "extra": extra}

    @classmethod
    def table(cls, name: str) -> JsonDict:
        """Return a table of the class and its bases: `keys`, `only` or `always`."""
        rows: JsonDict = {}
        for base in reversed(cls.__mro__):
            rows.update(vars(base).get(name, {}))
        return rows

    @classmethod
    def key(cls, name: str) -> str:
        """Return the key of a field in config.json, empty if it has none."""
        table = _KEYS.get(cls)
        if table is None:
            table = _KEYS[cls] = cls.table("keys")
        key: str = table.get(name, name)
        return key

    @classmethod
    def from_json(cls, data: Mapping[str, object], where: str = "config.json") -> Self:
        """Read a config.json of this family, in the spelling of transformers 4, 5 or both.

        Raises InputError with every problem; a key that is absent has transformers' default.
        """
        reader = Reader(data, cls.defaults, where)
        own_code = (cls.code_name or cls.model_type) if cls.own_code else ""
        refuse_what_needs_other_code(
            reader, cls.architecture, cls._is_architecture, own_code=own_code
        )
        for key, usual in cls.synonyms.items():
            # transformers takes the one for the other; equal ones are not kept.
            if reader.has(key) and reader.data[key] != reader.value(usual):
                fault = f"transformers takes it for {usual}, which is {shown(reader.value(usual))}"
                reader.refuse(key, fault, hint=f"state it as {usual} alone")
        reader.require(cls.table("only"))
        for key in cls.idle:
            reader.value(key)
        values = cls._read(reader)
        values["extra"] = read_extra(reader, cls.kept_numbers)
        try:
            config = cls(**values)
        except InputError as error:
            for problem in error.problems:
                reader.accept(problem)
            raise InputError(reader.problems) from None
        if reader.problems:
            raise InputError(reader.problems)
        return config

    def stated_heads(self) -> Mapping[str, tuple[str, ...]]:
        """Return the heads that files may hold, by their tasks."""
        return self.head_steps

    @property
    def first_tensor(self) -> str:
        """A tensor that every checkpoint of the family has."""
        return self.names.embedding

    @classmethod
    def _is_architecture(cls, name: str) -> bool:
        """Whether `name` is a class that the family's checkpoints may name."""
        if cls.with_heads and name.startswith(cls.architecture.removesuffix("Model")):
            return True
        return name == cls.architecture or name in cls.aliases

    def to_json(self) -> dict[str, object]:
        """Return config.json with the keys of transformers 4 and 5 side by side, sorted."""
        keys = {
            **self.extra,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            **self.table("always"),
            **self._write(),
        }
        return {key: copy.deepcopy(keys[key]) for key in sorted(keys)}

    def common(self) -> dict[str, object]:
        """Return the fields that every config of this shape has, to build another family's from."""
        return {f.name: getattr(self, f.name) for f in fields(self.shape())}

    @property
    def others_up_to(self) -> str:
        """How far a model of another family is from itself in this one, as of a promise."""
        return ""

    @property
    def is_complete(self) -> bool:
        """Whether the family's own files may lack the parts that `completed` adds."""
        return True

    def completed(self) -> tuple[ModelConfig, dict[str, Expr]]:
        """Return the config that engines read, and tensors that they want and a model lacks.

        Engines build some parts unconditionally, and take what lies in memory for a tensor that is
        not in the file; the values of these change nothing.
        """
        return self, {}

    def layers(self, stack: str) -> int:
        """Return the number of layers of one of `stacks`."""
        return int(getattr(self, "num_hidden_layers", 0))

    def layers_key(self, stack: str) -> str:
        """Return the key of that number in config.json."""
        return self.key("num_hidden_layers")

    @property
    def expert_blocks(self) -> int:
        """The number of the experts of all layers."""
        return 0

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return bool(getattr(self, "tie_word_embeddings", False))

    def fitted(self, tensors: Container[str]) -> Self:
        """Return the config of a file with `tensors`, which may say what a config leaves open."""
        return self

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return ModelConfig

    @classmethod
    def rules(cls) -> Iterator[tuple[str, KeyRule, str]]:
        """Yield the fields that have a key in the family's config.json: name, rule and key."""
        for f in fields(cls):
            rule, key = f.metadata.get("rule"), cls.key(f.name)
            if rule is not None and key and (not f.metadata["feature"] or f.name in cls.options):
                yield f.name, rule, key

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        """Read the fields; families add what no rule can say."""
        stated = [key for key in ("dtype", "torch_dtype") if reader.value(key) is not None]
        dtypes = {key: reader.choice(key, DTYPES) for key in stated}
        if len(set(dtypes.values())) > 1:
            reader.conflict(("dtype", "torch_dtype"), "the dtype is stated twice and differs")
        values: JsonDict = {**cls.fixed, "dtype": next(iter(dtypes.values()), None)}
        for name, rule, key in cls.rules():
            read = replace(rule, null=None) if name in cls.strict else rule
            values[name] = read.read(reader, key, values)
        return values

    def _write(self) -> JsonDict:
        """Return the keys of the fields; families add what no rule can say."""
        return {key: getattr(self, name) for name, _, key in self.rules()}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name, rule, key in self.rules():
            if problem := rule.problem(getattr(self, name), key):
                yield problem
        if self.dtype is not None and self.dtype not in DTYPES:
            yield key_problem("unknown dtype", one_of(DTYPES), self.dtype, "dtype")
        padding = self.extra.get("pad_token_id")
        has_tokens = bool(self.key("vocab_size"))
        if (
            has_tokens
            and isinstance(padding, int)
            and not -self.vocab_size <= padding < self.vocab_size
        ):
            fault = "the padding token is outside the vocabulary, which transformers rejects"
            expected = f"below {self.vocab_size}, or null"
            yield key_problem(fault, expected, f"{padding}", "pad_token_id", "vocab_size")

    def head_checks(self, width: str, heads: str) -> Iterator[KeyProblem]:
        """Yield a problem unless the heads of a field divide the width of another."""
        size, count = getattr(self, width), getattr(self, heads)
        if count > 0 and size % count:
            fault = "the heads do not divide the width"
            keys = (self.key(width), self.key(heads))
            yield key_problem(fault, f"a multiple of {count}", f"{size}", *keys)


_KEYS: dict[type[ModelConfig], JsonDict] = {}
"""The tables `keys` that `ModelConfig.key` has put together."""


@config_class
class PaddedPositionsConfig(ModelConfig):
    """A model whose positions count from behind that of the padding token.

    `position_offset` is the position of the first token.
    """

    position_offset: int = 2

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        padding = reader.value("pad_token_id")
        if type(padding) is not int or padding < 0:
            fault = "positions count from the id of the padding token"
            reader.refuse("pad_token_id", fault, expected="a token id")
            padding = 1
        return {**super()._read(reader), "position_offset": padding + 1}

    def _write(self) -> JsonDict:
        return {**super()._write(), "pad_token_id": self.position_offset - 1}


@config_class
class EqualHeadsConfig(ModelConfig):
    """A stack of equal layers, whose heads have keys of their own and fill the model's width."""

    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(NEURONS)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(COUNT)

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        heads = shrink_size(self.num_attention_heads, SMALL_HEADS)
        return {
            "hidden_size": heads * shrink_size(self.head_dim, SMALL_HEAD_DIM),
            "num_attention_heads": heads,
            "intermediate_size": shrink_size(self.intermediate_size, SMALL_MLP),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self.head_checks("hidden_size", "num_attention_heads")
