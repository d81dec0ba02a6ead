"""Rotary position embedding in a config, in both spellings of transformers.

Version 4 writes `rope_theta` and `rope_scaling` side by side, version 5 one `rope_parameters`.
Each version silently ignores the other's spelling, and version 5 lets `rope_scaling` win over
`rope_parameters`, so contradictory statements are rejected and both are written on export.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from moecc.errors import nearest
from moecc.families.reader import LENGTH, KeyProblem, Reader, key_problem, one_of
from moecc.support.untyped import JsonDict

SCALING_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "short_factor",
        "long_factor",
        "attention_factor",
    ),
}
SCALING_TYPES = tuple(name for name in SCALING_PARAMETERS if name != "longrope")
"""The scalings of most families; longrope is that of phi3 and phimoe."""
REQUIRED_PARAMETERS = ("factor", "low_freq_factor", "high_freq_factor")
# `finetuned` is a note in the first YaRN checkpoints that no loader reads.
OTHER_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned")
KNOWN_KEYS = frozenset(OTHER_KEYS).union(*SCALING_PARAMETERS.values())
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Base period and scaling of the rotary embedding; fields of other scalings are None.

    `original_max_position_embeddings` is always a number for `llama3` and `yarn`.  None in
    `beta_fast` and `beta_slow` means 32 and 1; `truncate` rounds YaRN's correction range.
    `short_factor` and `long_factor` are longrope's divisors of each frequency, up to the original
    length and beyond it; its `factor` is the growth of the length, and `attention_factor` is stated
    by phimoe alone.
    """

    theta: float
    type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"rope type {self.type}, theta {self.theta:g}"

    def scaling(self) -> dict[str, object]:
        """Return the parameters of the scaling, `rope_type` first, as both versions name them."""
        named: dict[str, object] = {"rope_type": self.type}
        if self.type == "longrope":
            factors = (self.short_factor, self.long_factor)
            return {**named, **dict(zip(_FACTORS, map(list, factors), strict=True))}
        for name in SCALING_PARAMETERS[self.type]:
            value = getattr(self, name)
            if value is not None and (name, value) != ("truncate", True):
                named[name] = value
        return named

    def to_json(self) -> dict[str, object]:
        """Return the keys of version 4 and of version 5, with the same meaning."""
        scaling = self.scaling()
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.type == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }

    def checks(self, head_dim: int, types: tuple[str, ...] = SCALING_TYPES) -> Iterator[KeyProblem]:
        """Yield the reasons why it cannot be computed for heads with `head_dim` rotated entries.

        Args:
          head_dim: the entries of a head that are rotated.
          types: the scalings that the family has.
        """
        if self.type not in types:
            is_known = self.type in SCALING_PARAMETERS
            fault = (
                "a rope type that this family does not have" if is_known else "unknown rope type"
            )
            yield key_problem(fault, one_of(types), self.type, *ROPE_KEYS)
            return
        yield from self._parameter_checks()
        if self.theta <= (1 if self.type == "yarn" else 0):
            bound = "greater than 1 for yarn, which divides by its logarithm, else than 0"
            yield key_problem("rope_theta is too small", bound, f"{self.theta}", *ROPE_KEYS)
        if self.type == "dynamic" and head_dim <= 2:
            fault = "dynamic scaling has the exponent head_dim / (head_dim - 2)"
            yield key_problem(fault, "head_dim above 2", f"{head_dim}", "head_dim", *ROPE_KEYS)
        if self.type == "longrope":
            yield from self._factor_checks(head_dim)

    def _factor_checks(self, head_dim: int) -> Iterator[KeyProblem]:
        for name in _FACTORS:
            factors = getattr(self, name) or ()
            if len(factors) != head_dim // 2 or not all(f > 0 for f in factors):
                fault = f"{name} has a positive divisor for each frequency"
                expected = f"{head_dim // 2} numbers above 0"
                yield key_problem(fault, expected, f"{len(factors)} numbers", *ROPE_KEYS)

    def _parameter_checks(self) -> Iterator[KeyProblem]:
        used = SCALING_PARAMETERS[self.type]
        for field in fields(self):
            if field.name in ("theta", "type"):
                continue
            value = getattr(self, field.name)
            if field.name not in used and value != field.default:
                fault = f"rope type {self.type} has no {field.name}"
                yield key_problem(fault, "nothing", f"{value}", *ROPE_KEYS)
        needed = [*REQUIRED_PARAMETERS, "original_max_position_embeddings"]
        for name in (name for name in needed if name in used and getattr(self, name) is None):
            fault = f"rope type {self.type} needs {name}"
            yield key_problem(fault, "a number above 0", "nothing", *ROPE_KEYS)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high < low:
            fault = "high_freq_factor must not be below low_freq_factor"
            yield key_problem(fault, f"at least {low}", f"{high}", *ROPE_KEYS)
        if (self.beta_fast or 32) < (self.beta_slow or 1):
            fault = "beta_fast (32 where absent) must not be below beta_slow (1 where absent)"
            yield key_problem(fault, None, f"{self.beta_fast} and {self.beta_slow}", *ROPE_KEYS)


_FACTORS = ("short_factor", "long_factor")


def read_rope(
    reader: Reader,
    max_position_embeddings: int,
    *,
    types: tuple[str, ...] = SCALING_TYPES,
    partial: bool = False,
    outside: bool = False,
) -> RopeConfig:
    """Read the rotary embedding from the spellings present, rejecting contradictions.

    Args:
      reader: of config.json.
      max_position_embeddings: its longest sequence.
      types: the scalings that the family has.
      partial: whether part of a head may be rotated, which the family reads for itself.
      outside: whether the original length is a key of its own, as in phi3.
    """
    if not partial:
        _refuse_partial_rotary(reader)
    stated = {
        key: part for key in ROPE_KEYS[1:] if (part := _part(reader, key, partial)) is not None
    }
    theta = _theta(reader, stated)
    if outside:
        length = reader.optional_size("original_max_position_embeddings", LENGTH)
    else:
        length = _original_length(reader, stated, max_position_embeddings)
    read = {
        key: _longrope(part, theta, length, max_position_embeddings)
        if _kind(part, types) == "longrope"
        else _rope(part, theta, length, types)
        for key, part in stated.items()
    }
    for key, part in stated.items():
        reader.problems.extend(part.problems)
        reader.bad.update({key} if part.problems else ())
    _refuse_contradiction(reader, read)
    return next(iter(read.values()), RopeConfig(theta=theta))


def refuse_former_name(reader: Reader) -> None:
    """Reject ``type`` alone in a family whose kinds of layers have parameters of their own.

    There version 5 updates parameters of the ``rope_type`` default, which wins, and 4 reads it.
    """
    stated = reader.mapping("rope_scaling") or {}
    is_former = "rope_type" not in stated and stated.get("type", "default") != "default"
    if is_former and reader.mapping("rope_parameters") is None:
        fault = "transformers 5 overlooks type in this family, and 4 reads it"
        reader.refuse("rope_scaling", fault, expected="rope_type beside it")


def read_partial_rotary(reader: Reader, head_dim: int, key: str, default: float) -> int | None:
    """Return how many entries of each head are rotated, or None for all of them.

    Version 4 reads `key`, version 5 also ``partial_rotary_factor`` of the rope parameters.
    """
    stated: dict[str, float] = {}
    for name in ROPE_KEYS[1:]:
        part = reader.data.get(name)
        if isinstance(part, Mapping) and part.get("partial_rotary_factor") is not None:
            inner = Reader(part, {}, f"{reader.where}: {name}")
            stated[name] = inner.number("partial_rotary_factor", above=0, most=1)
            reader.problems.extend(inner.problems)
    if reader.has(key) and reader.value(key) is not None:
        stated[key] = reader.number(key, above=0, most=1)
    elif reader.mapping("rope_scaling") is not None:
        stated.setdefault("rope_scaling", default)  # it wins over `rope_parameters`
    if len(set(stated.values())) > 1:
        reader.conflict(tuple(stated), "the rotated part of a head is stated twice and differs")
    share = next(iter(stated.values()), default)
    return None if share == 1 else int(head_dim * share)


def partial_rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """Return the share of which transformers makes `rotary_dim` again, rounding down."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 2)


def _part(reader: Reader, key: str, partial: bool) -> Reader | None:
    parameters = reader.mapping(key)
    if parameters is None:
        return None
    part = Reader(parameters, {"rope_type": "default", "truncate": True}, f"{reader.where}: {key}")
    for name in parameters:
        if name not in KNOWN_KEYS:
            hint = "one entry per layer type is not supported" if name.endswith("ention") else None
            hint = hint or nearest(name, KNOWN_KEYS)
            part.refuse(name, "unknown key", expected=one_of(KNOWN_KEYS), hint=hint)
    if not partial:
        _refuse_partial_rotary(part)
    return part


def _theta(reader: Reader, stated: Mapping[str, Reader]) -> float:
    shares: dict[str, float] = {}
    for key, part in {"rope_theta": reader, **stated}.items():
        if part.has("rope_theta"):
            shares[key] = part.number("rope_theta", above=0)
    if not shares:
        return reader.number("rope_theta", above=0)
    is_default = set(shares.values()) == {reader.defaults.get("rope_theta")}
    if "rope_scaling" in stated and "rope_theta" not in shares and not is_default:
        # Version 4 reads no base period in either, version 5 none of `rope_parameters` then.
        fault = "transformers ignores the base period inside, and takes its default"
        reader.refuse("rope_scaling", fault, expected="rope_theta beside it")
    if len(set(shares.values())) > 1:
        stating = ", ".join(f"{value} in {key}" for key, value in shares.items())
        fault = f"the base period is stated twice and differs: {stating}"
        reader.conflict(tuple(shares), fault, hint="keep the one that the model was trained with")
    return next(iter(shares.values()))


def _original_length(
    reader: Reader, stated: Mapping[str, Reader], max_position_embeddings: int
) -> int | None:
    """Return the length that YaRN starts from if its own parameters do not state it.

    Version 5 prefers a key outside the rope parameters, version 4 ignores it.
    """
    key = "original_max_position_embeddings"
    outside = reader.optional_size(key, LENGTH)
    for name, part in stated.items():
        uses = key in SCALING_PARAMETERS.get(str(_type_of(part)), ())
        inside = part.data.get(key, max_position_embeddings)
        if uses and outside is not None and outside != inside:
            fault = f"{key} is outside {name}, where transformers 4 and 5 read it differently"
            reader.refuse(key, fault, expected=f"{inside}", hint=f"move it into {name}")
    return max_position_embeddings


def _type_of(part: Reader) -> object:
    return part.data.get("rope_type", part.data.get("type", "default"))


def _kind(part: Reader, types: tuple[str, ...]) -> str | None:
    """Return the name of the scaling if it is one of `types`; what is wrong is left to `_rope`."""
    named = {str(part.value(key)) for key in ("rope_type", "type") if part.has(key)}
    return next(iter(named), None) if len(named) == 1 and named <= set(types) else None


def _rope(
    part: Reader, theta: float, original_length: int | None, types: tuple[str, ...]
) -> RopeConfig:
    if part.has("rope_type") and part.has("type") and part.value("rope_type") != part.value("type"):
        part.conflict(("rope_type", "type"), "the scaling is named twice and differs")
    key = "rope_type" if part.has("rope_type") or not part.has("type") else "type"
    kind = part.choice(key, types)
    values: JsonDict = {}
    for name in SCALING_PARAMETERS[kind]:
        if name in REQUIRED_PARAMETERS:
            values[name] = part.number(name, above=0)
        elif name in _FACTORS:
            values[name] = part.numbers(name)
        elif name not in ("truncate", "original_max_position_embeddings"):
            values[name] = _optional(part, name)
    length = part.optional_size("original_max_position_embeddings", LENGTH)
    uses_length = "original_max_position_embeddings" in SCALING_PARAMETERS[kind]
    if kind == "llama3" and length is None:
        # Version 5 falls back to max_position_embeddings here, version 4 rejects it.
        part.refuse("original_max_position_embeddings", "llama3 needs it", expected="a size")
    return RopeConfig(
        theta=theta,
        type=kind,
        original_max_position_embeddings=(length or original_length) if uses_length else None,
        truncate=part.flag("truncate") if kind == "yarn" else True,
        **values,
    )


def _longrope(
    part: Reader, theta: float, original_length: int | None, max_length: int
) -> RopeConfig:
    """Read the scaling of phi3, which transformers 4 takes with nothing but its two lists."""
    key = "original_max_position_embeddings"
    inside = part.optional_size(key, LENGTH)
    if inside is not None and original_length not in (None, inside):
        fault = "transformers 5 takes the length beside the parameters"
        part.refuse(key, fault, expected=f"{original_length}")
    length = inside or original_length
    for name in ("factor", "attention_factor"):
        if part.value(name) is not None:
            part.refuse(name, "transformers 4 rejects it beside the two lists", expected="nothing")
    if length is None:
        part.refuse(key, "longrope needs it", expected="a size")
    length = length or max_length
    return RopeConfig(
        theta=theta,
        type="longrope",
        factor=max_length / length,
        original_max_position_embeddings=length,
        short_factor=part.numbers("short_factor"),
        long_factor=part.numbers("long_factor"),
    )


def _optional(part: Reader, name: str) -> float | None:
    # transformers tests `mscale` for truth: zero means the same as a missing key.
    if name.startswith("mscale") and part.value(name) == 0:
        return None
    return part.optional_number(name)


def _refuse_contradiction(reader: Reader, read: Mapping[str, RopeConfig]) -> None:
    if len(set(read.values())) > 1 and not reader.bad.intersection(read):
        fault = "rope_scaling and rope_parameters differ"
        hint = "transformers 4 reads the first and 5 too, unless it is null; keep the right one"
        reader.conflict(("rope_scaling", "rope_parameters"), fault, hint=hint)
    explicit_null = reader.has("rope_scaling") and reader.value("rope_scaling") is None
    rope = read.get("rope_parameters")
    if explicit_null and rope is not None and rope.type != "default":
        fault = f"rope_scaling states none, rope_parameters states {rope.type}"
        hint = "remove rope_scaling, or write the scaling in both"
        reader.conflict(("rope_scaling", "rope_parameters"), fault, hint=hint)


def _refuse_partial_rotary(reader: Reader) -> None:
    if reader.value("partial_rotary_factor") not in (None, 1):
        fault = "these families do not support a rotation of only part of each head"
        reader.refuse("partial_rotary_factor", fault, expected="1, or nothing")


def attention_factor(rope: RopeConfig) -> float:
    """Return the factor on cosine and sine: 1 for every scaling but longrope and YaRN.

    A factor that is stated is that.  Else
    longrope (Ding et al. 2402.13753, §3.2): `√(1 + ln(factor) / ln(original length))`.
    YaRN (Peng et al. 2309.00071, §3.4): `0.1 ln(factor) + 1`, or the ratio of two such terms if
    `mscale` and `mscale_all_dim` are both stated.
    """
    if rope.type in ("longrope", "yarn") and rope.attention_factor is not None:
        return rope.attention_factor
    if rope.type == "longrope":
        length, growth = _needed(rope.original_max_position_embeddings), _needed(rope.factor)
        return math.sqrt(1 + math.log(growth) / math.log(length)) if growth > 1 else 1.0
    if rope.type != "yarn":
        return 1.0
    factor = _needed(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(factor, rope.mscale) / yarn_mscale(factor, rope.mscale_all_dim)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """Return the term of YaRN that grows with the logarithm of the factor."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _needed(value: float | None) -> float:
    """Narrow a parameter that the config's own checks guarantee."""
    assert value is not None
    return value
