"""The base of every config, whatever the shape of the model: reading, writing, checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import ClassVar, Self, TypeVar, dataclass_transform

from moecc.errors import InputError
from moecc.families.reader import (
    KEPT_NUMBERS,
    KeyProblem,
    Reader,
    key_problem,
    one_of,
    read_extra,
    refuse_what_needs_other_code,
    shown,
)
from moecc.support.untyped import JsonDict

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "relu": "relu",
}
"""Names of activations in configs, and moecc's name for each function."""

DTYPES = ("float32", "float16", "bfloat16", "float64")

Config = TypeVar("Config")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, field))
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

    Raises InputError on construction if the values are inconsistent or the family
    cannot express them.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    # What the model is, in messages.
    kind: ClassVar[str] = "an encoder alone"
    # Other names that the class in `architectures` has had.
    aliases: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, object]]
    # Whether code named after the family, which its first checkpoints bring, is in transformers.
    own_code: ClassVar[bool] = False
    # The prefix of the base model's tensors, which files of it alone lack.
    base_prefix: ClassVar[str] = ""
    # The prefix that the tensors have in files of a model with a head.
    head_prefix: ClassVar[str] = ""
    # Whether classes of the family with a head are read, too, without it.
    with_heads: ClassVar[bool] = False
    # Whether files may hold a pooler, on which no output depends.
    has_pooler: ClassVar[bool] = False
    # Whether its graph may have a mask of padding, and a word for those who ask in vain.
    takes_mask: ClassVar[bool] = False
    mask_hint: ClassVar[str | None] = None
    # Whether it reads tokens at all.
    has_vocabulary: ClassVar[bool] = True
    least_vocabulary: ClassVar[int] = 1
    # Keys that set another one in transformers, whose value they replace.
    synonyms: ClassVar[Mapping[str, str]] = {}
    # The key of a field in config.json, where it has another name.
    keys: ClassVar[Mapping[str, str]] = {}
    # Numbers that an export keeps with their default if the file omits them.
    kept_numbers: ClassVar[tuple[str, ...]] = KEPT_NUMBERS

    vocab_size: int = 0
    dtype: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    def __init__(self, **given: object) -> None:
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            value = given.pop(f.name, default)
            if value is MISSING:
                raise TypeError(f"{type(self).__name__}: the field {f.name!r} is missing")
            object.__setattr__(self, f.name, value)
        if given:
            raise TypeError(f"{type(self).__name__} has no field {next(iter(given))!r}")
        self.__post_init__()

    def __repr__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{type(self).__qualname__}({shown})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self))

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self) if f.hash is not False))

    def __post_init__(self) -> None:
        problems = list(self.checks())
        if problems:
            name = type(self).__name__
            raise InputError(
                replace(problem, where=f"{name}: {problem.where}") for problem in problems
            )

    @classmethod
    def key(cls, name: str) -> str:
        """Return the key of a field in config.json."""
        return cls.keys.get(name, name)

    @classmethod
    def from_json(cls, data: Mapping[str, object], where: str = "config.json") -> Self:
        """Read a config.json of this family, in the spelling of transformers 4, 5 or both.

        Raises InputError with every problem; a key that is absent has transformers' default.
        """
        reader = Reader(data, cls.defaults, where)
        refuse_what_needs_other_code(
            reader, cls.architecture, cls._is_architecture, own_code=cls.own_code
        )
        cls._check_synonyms(reader)
        values = cls._read(reader)
        values["extra"] = read_extra(reader, cls.kept_numbers)
        config = cls._construct(values, reader)
        if config is None or reader.problems:
            raise InputError(reader.problems)
        return config

    @classmethod
    def _check_synonyms(cls, reader: Reader) -> None:
        """Reject a key that replaces the value of another one; equal ones are not kept."""
        for key, usual in cls.synonyms.items():
            if reader.has(key) and reader.data[key] != reader.value(usual):
                what = f"transformers takes it for {usual}, which is {shown(reader.value(usual))}"
                reader.refuse(key, what, hint=f"state the size as {usual} alone")

    @classmethod
    def _is_architecture(cls, name: str) -> bool:
        """Whether `name` is a class that the family's checkpoints may name."""
        if cls.with_heads and name.startswith(cls.architecture.removesuffix("Model")):
            return True
        return name == cls.architecture or name in cls.aliases

    @classmethod
    def _construct(cls, values: JsonDict, reader: Reader) -> Self | None:
        try:
            return cls(**values)
        except InputError as error:
            for problem in error.problems:
                reader.accept(problem)
            return None

    def to_json(self) -> dict[str, object]:
        """Return config.json with the keys of transformers 4 and 5 side by side, sorted."""
        keys = {
            **self.extra,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            **({"vocab_size": self.vocab_size} if self.has_vocabulary else {}),
            **self._write(),
        }
        return {key: copy.deepcopy(keys[key]) for key in sorted(keys)}

    def common(self) -> dict[str, object]:
        """Return the fields that every config of this shape has, to build another family's from."""
        return {f.name: getattr(self, f.name) for f in fields(self.shape())}

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return ModelConfig

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        """Read the fields that all families have; families add their own."""
        dtype = {"dtype": _read_dtype(reader)}
        if not cls.has_vocabulary:
            return {**dtype}
        return {**dtype, "vocab_size": reader.size("vocab_size", smallest=cls.least_vocabulary)}

    def _write(self) -> dict[str, object]:
        """Return the keys of the family."""
        return {}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        if self.dtype is not None and self.dtype not in DTYPES:
            yield key_problem("unknown dtype", one_of(DTYPES), self.dtype, "dtype")
        padding = self.extra.get("pad_token_id")
        if isinstance(padding, int) and not -self.vocab_size <= padding < self.vocab_size:
            what = "the padding token is outside the vocabulary, which transformers rejects"
            expected = f"below {self.vocab_size}, or null"
            yield key_problem(what, expected, f"{padding}", "pad_token_id", "vocab_size")


def activation_problem(act: str, key: str = "hidden_act") -> Iterator[KeyProblem]:
    """Yield a problem unless `act` is an activation that moecc supports."""
    if act not in ACTIVATIONS.values():
        yield key_problem("unknown activation", one_of(set(ACTIVATIONS.values())), act, key)


def _read_dtype(reader: Reader) -> str | None:
    """Read the type of the stored weights, `torch_dtype` in version 4 and `dtype` in 5."""
    stated = [key for key in ("dtype", "torch_dtype") if reader.value(key) is not None]
    found = {key: reader.choice(key, DTYPES) for key in stated}
    if len(set(found.values())) > 1:
        reader.conflict(("dtype", "torch_dtype"), "the dtype is stated twice and differs")
    return next(iter(found.values()), None)
