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

from moecc.errors import Problem, nearest, printable

# No published model comes near these; a larger size is a mistake or an attack, and would
# otherwise be found only when memory runs out.
LARGEST_SIZES: Mapping[str, int] = {
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 40,
    "sliding_window": 1 << 40,
    "max_window_layers": 1 << 40,
    "original_max_position_embeddings": 1 << 40,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 24,
    "shared_expert_intermediate_size": 1 << 24,
    "decoder_sparse_step": 10_000,
    "first_k_dense_replace": 10_000,
    "n_routed_experts": 1 << 16,
    "n_shared_experts": 1 << 10,
    "n_group": 1 << 16,
    "topk_group": 1 << 16,
    "moe_k": 1 << 16,
    "moe_num_experts": 1 << 16,
    "moe_num_shared_experts": 1 << 10,
    "moe_layer_interval": 10_000,
    "moe_layer_start_index": 10_000,
    "moe_layer_end_index": 10_000,
    "d_model": 1 << 20,
    "d_kv": 1 << 16,
    "d_ff": 1 << 24,
    "num_layers": 10_000,
    "num_decoder_layers": 10_000,
    "num_heads": 1 << 16,
    "relative_attention_num_buckets": 1 << 10,
    "relative_attention_max_distance": 1 << 16,
    "expert_capacity": 1 << 40,
    "num_sparse_encoder_layers": 10_000,
    "num_sparse_decoder_layers": 10_000,
    "type_vocab_size": 1 << 16,
    "no_rope_layer_interval": 10_000,
    "sliding_window_pattern": 10_000,
    "encoder_layers": 10_000,
    "decoder_layers": 10_000,
    "encoder_attention_heads": 1 << 16,
    "decoder_attention_heads": 1 << 16,
    "encoder_ffn_dim": 1 << 24,
    "decoder_ffn_dim": 1 << 24,
    "num_mel_bins": 1 << 16,
    "max_source_positions": 1 << 24,
    "max_target_positions": 1 << 40,
    "image_size": 1 << 16,
    "patch_size": 1 << 12,
    "num_channels": 1 << 12,
    "n_embd": 1 << 20,
    "n_inner": 1 << 24,
    "n_layer": 10_000,
    "n_head": 1 << 16,
    "n_positions": 1 << 40,
}

LARGEST_OTHER = 1 << 24
"""The limit of the sizes of families that are added."""


@dataclass(frozen=True, slots=True)
class KeyProblem(Problem):
    """A problem involving several keys: silent if one of them is bad already."""

    keys: tuple[str, ...] = ()


def key_problem(what: str, expected: str | None, found: str, *keys: str) -> KeyProblem:
    """Return a problem at the first of `keys`, silent if reading found any of them bad."""
    return KeyProblem(what, keys[0], expected, found, None, keys)


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
        other = Reader(data, self.defaults, self.where)
        other.problems, other.bad, other.used = self.problems, self.bad, self.used
        return other

    def has(self, key: str) -> bool:
        """Return whether the object states `key`, even as null."""
        self.used.add(key)
        return key in self.data

    def value(self, key: str) -> object:
        """Return the value at `key`, or its default."""
        return self.data[key] if self.has(key) else self.defaults.get(key)

    def refuse(
        self, key: str, what: str, *, expected: str | None = None, hint: str | None = None
    ) -> None:
        """Record that the value at `key` is rejected."""
        self.bad.add(key)
        found = shown(self.data[key]) if key in self.data else "nothing"
        where = f"{self.where}: {printable(key, 60)}"
        self.problems.append(Problem(what, where, expected, found, hint))

    def conflict(self, keys: tuple[str, ...], what: str, *, hint: str | None = None) -> None:
        """Record that several keys contradict each other."""
        self.bad.update(keys)
        found = ", ".join(f"{key} = {shown(self.data[key])}" for key in keys if key in self.data)
        where = f"{self.where}: {' / '.join(keys)}"
        self.problems.append(Problem(what, where, "the same in each", found, hint))

    def accept(self, problem: Problem) -> None:
        """Record a problem of the finished config, unless it follows from a bad key."""
        if not isinstance(problem, KeyProblem):
            self.problems.append(problem)
        elif not self.bad.intersection(problem.keys):
            self.problems.append(replace(problem, where=f"{self.where}: {problem.keys[0]}"))

    def size(self, key: str, *, smallest: int = 1) -> int:
        """Return an integer of at least `smallest` and of plausible magnitude."""
        found = self.value(key)
        largest = LARGEST_SIZES.get(key, LARGEST_OTHER)
        if isinstance(found, int) and not isinstance(found, bool) and smallest <= found <= largest:
            return found
        self.refuse(key, "not a usable size", expected=f"a whole number, {smallest} to {largest:,}")
        default = self.defaults.get(key)
        return default if isinstance(default, int) else smallest

    def optional_size(self, key: str) -> int | None:
        """Return a size, or None for null without a default."""
        return None if self.value(key) is None else self.size(key)

    def number(
        self,
        key: str,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float = math.inf,
    ) -> float:
        """Return a finite number, greater than `above` or at least `least`, if stated."""
        found = as_number(self.value(key))
        if found is not None and not _out_of_range(found, above, least) and found <= most:
            return found
        bound = f" above {above:g}" if above is not None else ""
        bound = f" of at least {least:g}" if least is not None else bound
        bound += f", at most {most:g}" if most < math.inf else ""
        self.refuse(key, "not a usable number", expected=f"a finite number{bound}")
        default = self.defaults.get(key)
        return float(default) if isinstance(default, int | float) else 1.0

    def optional_number(self, key: str, *, above: float | None = None) -> float | None:
        """Return a number, or None for null or a missing key."""
        return None if self.value(key) is None else self.number(key, above=above)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        found = [as_number(value) for value in self.items(key)]
        if any(number is None for number in found):
            self.refuse(key, "not a list of numbers", expected="finite numbers")
            return ()
        return tuple(number for number in found if number is not None)

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        found = self.value(key)
        if isinstance(found, bool):
            return found
        self.refuse(key, "neither true nor false", expected="true or false")
        return self.defaults.get(key) is True

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return one of `choices`."""
        found = self.value(key)
        if isinstance(found, str) and found in choices:
            return found
        hint = nearest(found, choices) if isinstance(found, str) else None
        self.refuse(key, "not supported", expected=one_of(choices), hint=hint)
        default = self.defaults.get(key)
        return default if isinstance(default, str) else next(iter(choices))

    def items(self, key: str) -> tuple[object, ...]:
        """Return the members of a list; null is the empty list."""
        found = self.value(key)
        if found is None:
            return ()
        if isinstance(found, list | tuple):
            return tuple(found)
        self.refuse(key, "not a list", expected="a list")
        return ()

    def mapping(self, key: str) -> Mapping[str, object] | None:
        """Return an object, or None if it is absent, null or empty."""
        found = self.value(key)
        if found is None or found == {}:
            return None
        if isinstance(found, Mapping):
            return found
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


def _out_of_range(number: float, above: float | None, least: float | None) -> bool:
    return (above is not None and number <= above) or (least is not None and number < least)


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
    reader: Reader, architecture: str, is_own: Callable[[str], bool], *, own_code: bool = False
) -> None:
    """Reject remote code, quantised weights and models with another head.

    With `own_code` the code of the family itself, which transformers took over, is not remote.
    """
    family = reader.value("model_type")
    if not (own_code and _is_own_code(reader.value("auto_map"), str(family))) and (
        reader.value("auto_map") not in (None, {})
    ):
        what = "the checkpoint brings its own Python code, which moecc never runs"
        hint = f"if the model is a plain {architecture}, remove auto_map"
        reader.refuse("auto_map", what, expected="nothing", hint=hint)
    if reader.value("quantization_config") is not None:
        what = "the weights are quantised"
        hint = (
            "dequantise first: load with transformers, call model.dequantize(), save as bfloat16; "
            "or take the unquantised checkpoint"
        )
        reader.refuse("quantization_config", what, expected="nothing", hint=hint)
    named = reader.items("architectures")
    if "architectures" not in reader.bad and not all(is_own(str(name)) for name in named):
        what = "another model class than this family's language model"
        reader.refuse("architectures", what, expected=f"[{architecture!r}]")


def refuse_attention_to_later_tokens(reader: Reader) -> None:
    """Reject a decoder that `is_causal` makes attend to later tokens, as transformers 5 reads it.

    Any value that Python takes for false, null included, switches the mask off there.
    """
    if reader.has("is_causal") and reader.value("is_causal") is not True:
        what = "every token of such a decoder attends to later ones, too"
        hint = "remove the key if the model ran with a causal mask"
        reader.refuse("is_causal", what, expected="true", hint=hint)


def _is_own_code(found: object, family: str) -> bool:
    """Whether an ``auto_map`` names nothing but the family's own modules."""
    own = (f"configuration_{family}.", f"modeling_{family}.")
    values = found.values() if isinstance(found, Mapping) else ()
    return all(isinstance(value, str) and value.startswith(own) for value in values)


def read_extra(reader: Reader, numbers: tuple[str, ...] = KEPT_NUMBERS) -> dict[str, object]:
    """Return the keys that an export keeps: everything not yet read, checked and copied."""
    extra = _known_extra(reader, numbers)
    for key in reader.data:
        if key in OTHER_FAMILIES and key not in reader.used:
            _refuse_unless_idle(reader, key)
        elif key not in DROPPED and key not in reader.used:
            extra[key] = reader.data[key]
    unfit = {key: what for key, value in extra.items() if (what := unfit_for_json(value))}
    for key, what in unfit.items():
        reader.refuse(key, what, expected="a plain JSON value")
    return {key: copy.deepcopy(value) for key, value in extra.items() if key not in unfit}


def unfit_for_json(value: object) -> str | None:
    """Return why `value` cannot be written back as JSON, or None; without recursion."""
    level, seen = [value], 0
    for _ in range(DEEPEST_EXTRA):
        seen += len(level)
        if seen > MOST_EXTRA_VALUES:
            return f"more than {MOST_EXTRA_VALUES:,} values"
        wrong = next((found for found in level if not _is_json(found)), level)
        if wrong is not level:
            return f"not a JSON value: {shown(wrong)}"
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return None
    return f"nested more than {DEEPEST_EXTRA} deep"


def _known_extra(reader: Reader, numbers: tuple[str, ...]) -> dict[str, object]:
    extra: dict[str, object] = {"use_cache": reader.flag("use_cache")}
    for key in numbers:
        # transformers accepts null for a dropout and then drops nothing.
        absent = key.endswith("dropout") and reader.value(key) is None
        extra[key] = 0.0 if absent else reader.number(key, least=0)
    for key in TOKEN_KEYS:
        extra[key] = _token_ids(reader, key)
    return extra


def _token_ids(reader: Reader, key: str) -> object:
    value = reader.value(key)
    several = isinstance(value, list) and key == "eos_token_id"
    ids = value if isinstance(value, list) and several else [value]
    if value is not None and not all(type(one) is int for one in ids):
        expected = "a whole number" + (", a list of them" if key == "eos_token_id" else "")
        reader.refuse(key, "not a token id", expected=f"{expected} or null")
    return value


def _refuse_unless_idle(reader: Reader, key: str) -> None:
    value = reader.data[key]
    switched_off = key == "sliding_window" and reader.data.get("use_sliding_window") is False
    if value in (None, False, 0, [], {}) or switched_off:
        return
    what = "this family has no such key; transformers ignores it, other families would read it"
    hint = "remove it if the model ran with transformers, or correct model_type"
    reader.refuse(key, what, expected="nothing", hint=hint)


def _is_json(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value)
    return value is None or isinstance(value, str | bool | int | list)


def _members(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []
