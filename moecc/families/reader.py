"""Typed values of an untrusted JSON object; every problem is collected, not only the first.

A config is untrusted input.  The reader never raises for a wrong value: it records the problem,
returns the default, and remembers the key as bad, so that reading continues and later
checks stay silent about values that were never read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from moecc.errors import Problem, nearest, printable

# No published model comes near these; a larger size is a mistake or an attack, and would
# otherwise be found only when memory runs out.
LAYERS, COUNT, WIDTH, NEURONS = 10_000, 1 << 16, 1 << 20, 1 << 24
VOCABULARY, LENGTH = 1 << 26, 1 << 40

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class KeyProblem(Problem):
    """A problem involving several keys: silent if one of them is bad already."""

    keys: tuple[str, ...] = ()


def key_problem(fault: str, expected: str | None, value: str, *keys: str) -> KeyProblem:
    """Return a problem at the first of `keys`, silent if reading found any of them bad."""
    return KeyProblem(fault, keys[0], expected, value, None, keys)


class Reader:
    """Reads keys of one JSON object by type, and collects the problems."""

    def __init__(self, data: Mapping[str, object], defaults: Mapping[str, object], where: str):
        self.data = data
        self.defaults = defaults
        self.where = where
        self.problems: list[Problem] = []
        self.bad: set[str] = set()
        self.used: set[str] = set()

    def with_data(self, data: Mapping[str, object]) -> Reader:
        """Return a reader of `data` that collects its problems with those of this one."""
        reader = Reader(data, self.defaults, self.where)
        reader.problems, reader.bad, reader.used = self.problems, self.bad, self.used
        return reader

    def without(self, *keys: str) -> Reader:
        """Return a reader of the object without `keys`, as `with_data` does."""
        return self.with_data({k: value for k, value in self.data.items() if k not in keys})

    def has(self, key: str) -> bool:
        """Return whether the object states `key`, even as null."""
        self.used.add(key)
        return key in self.data

    def value(self, key: str) -> object:
        """Return the value at `key`, or its default."""
        return self.data[key] if self.has(key) else self.defaults.get(key)

    def refuse(
        self, key: str, fault: str, *, expected: str | None = None, hint: str | None = None
    ) -> None:
        """Record that the value at `key` is rejected."""
        self.bad.add(key)
        value = shown(self.data[key]) if key in self.data else "nothing"
        where = f"{self.where}: {printable(key, 60)}"
        problem = Problem(fault, where, expected, value, hint)
        if problem not in self.problems:
            self.problems.append(problem)

    def conflict(self, keys: tuple[str, ...], fault: str, *, hint: str | None = None) -> None:
        """Record that several keys contradict each other."""
        self.bad.update(keys)
        values = ", ".join(f"{key} = {shown(self.data[key])}" for key in keys if key in self.data)
        where = f"{self.where}: {' / '.join(keys)}"
        self.problems.append(Problem(fault, where, "the same in each", values, hint))

    def require(self, only: Mapping[str, tuple[object, str]]) -> None:
        """Refuse the keys of `only` that are stated, or have a default, with another value.

        Args:
          only: for each key the one value that is supported, and why others are not.
        """
        for key, (supported, why) in only.items():
            value = self.value(key)
            is_stated = key in self.data or key in self.defaults
            if is_stated and (type(value) is not type(supported) or value != supported):
                self.refuse(key, why, expected=f"{supported}".lower())

    def accept(self, problem: Problem) -> None:
        """Record a problem of the finished config, unless it follows from a bad key."""
        if not isinstance(problem, KeyProblem):
            self.problems.append(problem)
        elif not self.bad.intersection(problem.keys):
            stated = [key for key in problem.keys if key in self.data] or problem.keys[:1]
            where = f"{self.where}: {' / '.join(stated)}"
            self.problems.append(replace(problem, where=where))

    def size(self, key: str, most: int = NEURONS, *, smallest: int = 1) -> int:
        """Return an integer from `smallest` to `most`."""
        value = self.value(key)
        if isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= most:
            return value
        self.refuse(key, "not a usable size", expected=f"a whole number, {smallest} to {most:,}")
        default = self.defaults.get(key)
        return default if isinstance(default, int) else smallest

    def optional_size(self, key: str, most: int = NEURONS) -> int | None:
        """Return a size, or None for null without a default."""
        return None if self.value(key) is None else self.size(key, most)

    def number(
        self,
        key: str,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float = math.inf,
    ) -> float:
        """Return a finite number, greater than `above` or at least `least`, if stated."""
        number = as_number(self.value(key))
        in_range = number is not None and not (
            (above is not None and number <= above)
            or (least is not None and number < least)
            or number > most
        )
        if number is not None and in_range:
            return number
        bound = f" above {above:g}" if above is not None else ""
        bound = f" of at least {least:g}" if least is not None else bound
        bound += f", at most {most:g}" if most < math.inf else ""
        self.refuse(key, "not a usable number", expected=f"a finite number{bound}")
        default = self.defaults.get(key)
        return float(default) if isinstance(default, int | float) else 1.0

    def optional_number(self, key: str) -> float | None:
        """Return a number above 0, or None for null or a missing key."""
        return None if self.value(key) is None else self.number(key, above=0)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        items = self.items(key)
        numbers = tuple(n for n in map(as_number, items) if n is not None)
        if len(numbers) < len(items):
            self.refuse(key, "not a list of numbers", expected="finite numbers")
            return ()
        return numbers

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers."""
        items = self.items(key)
        numbers = tuple(number for number in items if type(number) is int)
        if len(numbers) < len(items):
            self.refuse(key, "not a list of whole numbers", expected="whole numbers")
        return numbers

    def layer_kinds(
        self, key: str, kinds: Mapping[str, Kind], layers: int
    ) -> tuple[Kind, ...] | None:
        """Return for each layer what `kinds` says of its name in a list, or None for null.

        None also stands for a list that is refused.
        """
        names = self.items(key)
        if self.value(key) is None or key in self.bad:
            return None
        if not all(isinstance(name, str) and name in kinds for name in names):
            expected = f"{' or '.join(kinds)} for each layer"
            self.refuse(key, "unknown kind of layer", expected=expected)
        elif len(names) == layers:
            return tuple(kinds[str(name)] for name in names)
        elif "num_hidden_layers" not in self.bad:
            fault = f"{len(names)} entries for {layers} layers"
            self.refuse(key, fault, expected=f"{layers} entries")
        return None

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value = self.value(key)
        if isinstance(value, bool):
            return value
        self.refuse(key, "neither true nor false", expected="true or false")
        return self.defaults.get(key) is True

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return one of `choices`."""
        value = self.value(key)
        if isinstance(value, str) and value in choices:
            return value
        hint = nearest(value, choices) if isinstance(value, str) else None
        self.refuse(key, "not supported", expected=one_of(choices), hint=hint)
        default = self.defaults.get(key)
        return default if isinstance(default, str) else next(iter(choices))

    def items(self, key: str) -> tuple[object, ...]:
        """Return the members of a list; null is the empty list."""
        value = self.value(key)
        if value is None:
            return ()
        if isinstance(value, list | tuple):
            return tuple(value)
        self.refuse(key, "not a list", expected="a list")
        return ()

    def mapping(self, key: str) -> Mapping[str, object] | None:
        """Return an object, or None if it is absent, null or empty."""
        value = self.value(key)
        if value is None or value == {}:
            return None
        if isinstance(value, Mapping):
            return value
        self.refuse(key, "not an object", expected="an object or null")
        return None


def as_number(value: object) -> float | None:
    """Return a JSON number as a finite float, or None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def one_of(choices: Collection[str]) -> str:
    """List the members of `choices` for an error message."""
    return "one of " + ", ".join(sorted(choices))


def shown(value: object) -> str:
    """Describe an untrusted JSON value in a few words, whatever its size or depth."""
    if isinstance(value, str):
        return f"the text {printable(value, 60)!r}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        names = ", ".join(printable(str(name), 40) for name in list(value)[:6])
        return f"an object with {len(value)} keys: {names}"
    if isinstance(value, list | tuple):
        simple = len(value) <= 8 and not any(isinstance(v, list | tuple | Mapping) for v in value)
        return f"[{', '.join(map(shown, value))}]" if simple else f"a list of {len(value)}"
    return repr(value) if isinstance(value, float) else f"a {type(value).__name__}"


# Keys that do not affect the function: those an export keeps, drops or rejects.
#
# Every key that a family does not read ends here.  A key with a meaning in another family
# is rejected rather than copied, because it would take effect after an export.

EXTRA_DEFAULTS: Mapping[str, object] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "use_cache": True,
}
"""Kept with their default if absent, because the defaults of two families may differ."""

DROPPED = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "experts_implementation",
        "max_window_layers",
        "router_aux_loss_coef",
        "transformers_version",
        "transformers_weights",
    }
)
"""Provenance and runtime keys, and settings whose meaning depends on another key."""

OTHER_FAMILIES = frozenset(
    {
        # Keys that some family here reads.
        "attn_logit_softcapping",
        "attention_multiplier",
        "embedding_multiplier",
        "final_logit_softcapping",
        "logits_scaling",
        "no_rope_layers",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "attention_bias",
        "decoder_sparse_step",
        "expert_capacity",
        "mlp_bias",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "qkv_bias",
        "router_jitter_noise",
        "shared_expert_intermediate_size",
        "sliding_window",
        "use_sliding_window",
        # Keys that change the function in families that moecc does not support.
        "clip_qkv",
        "first_k_dense_replace",
        "layer_norm_eps",
        "n_routed_experts",
        "n_shared_experts",
        "per_layer_config",
        "rope_interleaved",
        "use_qk_norm",
        "moe_k",
        "moe_layer_end_index",
        "moe_layer_interval",
        "moe_layer_start_index",
        "moe_num_experts",
        "moe_num_shared_experts",
        "n_group",
        "routed_scaling_factor",
        "topk_group",
    }
)

MOST_EXTRA_VALUES = 200_000
DEEPEST_EXTRA = 16


TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

KEPT_NUMBERS = ("initializer_range", "attention_dropout")
"""Numbers that the decoder families keep; those of other shapes of model have other names."""


def refuse_what_needs_other_code(
    reader: Reader, architecture: str, is_own: Callable[[str], bool], *, own_code: str = ""
) -> None:
    """Reject remote code, quantised weights and models with another head.

    Code named after `own_code`, the family's own that transformers took over, is not remote.
    """
    reader.used.add("model_type")
    modules = reader.value("auto_map")
    prefixes = (f"configuration_{own_code}.", f"modeling_{own_code}.")
    # Code of a tokenizer is of no model.
    named_code = modules.items() if isinstance(modules, Mapping) else ()
    paths = [path for name, path in named_code if name != "AutoTokenizer"]
    is_remote = not own_code or not all(
        isinstance(v, str) and v.startswith(prefixes) for v in paths
    )
    if is_remote and modules not in (None, {}):
        fault = "the checkpoint brings its own Python code, which moecc never runs"
        hint = f"if the model is a plain {architecture}, remove auto_map"
        reader.refuse("auto_map", fault, expected="nothing", hint=hint)
    if reader.value("quantization_config") is not None:
        fault = "the weights are quantised"
        hint = (
            "dequantise first: load with transformers, call model.dequantize(), save as bfloat16; "
            "or take the unquantised checkpoint"
        )
        reader.refuse("quantization_config", fault, expected="nothing", hint=hint)
    named = reader.items("architectures")
    if "architectures" not in reader.bad and not all(is_own(str(name)) for name in named):
        fault = "another model class than this family's language model"
        hint = "moecc convert --via torch reads any class of transformers, its head included"
        reader.refuse("architectures", fault, expected=f"[{architecture!r}]", hint=hint)


def read_extra(reader: Reader, numbers: tuple[str, ...] = KEPT_NUMBERS) -> dict[str, object]:
    """Return the keys that an export keeps: everything not yet read, checked and copied."""
    extra: dict[str, object] = {"use_cache": reader.flag("use_cache")}
    for key in numbers:
        # transformers accepts null for a dropout and then drops nothing.
        absent = key.endswith("dropout") and reader.value(key) is None
        extra[key] = 0.0 if absent else reader.number(key, least=0)
    for key in TOKEN_KEYS:
        extra[key] = token = reader.value(key)
        ids = token if isinstance(token, list) and key == "eos_token_id" else [token]
        if token is not None and not all(type(id) is int for id in ids):
            expected = "a whole number" + (", a list of them" if key == "eos_token_id" else "")
            reader.refuse(key, "not a token id", expected=f"{expected} or null")
    for key, value in reader.data.items():
        if key in OTHER_FAMILIES and key not in reader.used:
            no_window = key == "sliding_window" and reader.data.get("use_sliding_window") is False
            if value in (None, False, 0, [], {}) or no_window:
                continue
            clash = "this family has no such key; transformers ignores it, other families read it"
            hint = "remove it if the model ran with transformers, or correct model_type"
            reader.refuse(key, clash, expected="nothing", hint=hint)
        elif key not in DROPPED and key not in reader.used:
            extra[key] = value
    unfit = {key: fault for key, value in extra.items() if (fault := unfit_for_json(value))}
    for key, fault in unfit.items():
        reader.refuse(key, fault, expected="a plain JSON value")
    return {key: copy.deepcopy(value) for key, value in extra.items() if key not in unfit}


def unfit_for_json(value: object) -> str | None:
    """Return why `value` cannot be written back as JSON, or None; without recursion."""
    level, count = [value], 0
    for _ in range(DEEPEST_EXTRA):
        count += len(level)
        if count > MOST_EXTRA_VALUES:
            return f"more than {MOST_EXTRA_VALUES:,} values"
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, float) and math.isfinite(item):
                continue
            elif item is not None and not isinstance(item, str | int):
                return f"not a JSON value: {shown(item)}"
        if not inner:
            return None
        level = inner
    return f"nested more than {DEEPEST_EXTRA} deep"
