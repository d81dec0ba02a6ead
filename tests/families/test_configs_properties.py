"""Properties of configs in general: round trips, either spelling, no unforeseen failure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from family_configs import (
    activations,
    choices,
    feature_values,
    fills_width,
    gate_values,
    shared_widths,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from moecc.errors import InputError
from moecc.families.decoder import DecoderConfig
from moecc.families.llama import MixtralConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import decoders, parse_config
from moecc.families.rope import RopeConfig, attention_factor
from tests.support.rotary_tables import rotary_frequencies

from .small_config import small

sizes = st.integers(1, 64)
numbers = st.floats(0.001, 1e7, allow_subnormal=False)


@st.composite
def ropes(draw: st.DrawFn, kinds: tuple[str, ...]) -> RopeConfig:
    kind = draw(st.sampled_from([name for name in kinds if name != "longrope"]))
    values: dict[str, Any] = {"theta": draw(st.floats(1.5, 1e7)), "type": kind}
    if kind != "default":
        values["factor"] = draw(numbers)
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = draw(sizes)
    if kind == "llama3":
        values["low_freq_factor"] = draw(st.floats(0.5, 2))
        values["high_freq_factor"] = draw(st.floats(2.5, 8))
    if kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            values[name] = draw(st.none() | numbers)
        values["beta_fast"] = draw(st.none() | st.floats(2, 64))
        values["beta_slow"] = draw(st.none() | st.floats(0.1, 2))
        values["truncate"] = draw(st.booleans())
    return RopeConfig(**values)


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    family = decoders()[draw(st.sampled_from(sorted(decoders())))]
    groups, repeats = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(2, 8))
    heads = groups * repeats
    layers = draw(st.integers(1, 6))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(10, 100)),
        "hidden_size": heads * (head_dim if fills_width(family) else draw(sizes)),
        "intermediate_size": draw(sizes),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": draw(sizes),
        "rope": draw(ropes(family.rope_types)),
        "rms_norm_eps": draw(st.floats(0, 0.1)),
        "hidden_act": draw(activations(family)),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_windows": draw(windows(family.window_style, layers)),
        "dtype": draw(st.sampled_from([None, "float32", "bfloat16"])),
        "extra": draw(extras()),
        **family.fixed,
    }
    values |= draw(feature_values(family, values))
    if issubclass(family, MoeConfig):
        values |= draw(experts(family, layers, values["intermediate_size"]))
    return family(**values)


@st.composite
def windows(draw: st.DrawFn, style: str, layers: int) -> tuple[int | None, ...]:
    if style == "none":
        return (None,) * layers
    window = draw(sizes)
    if style in ("top", "typed"):
        return tuple(draw(st.sampled_from([None, window])) for _ in range(layers))
    return (draw(st.sampled_from([None, window])),) * layers


@st.composite
def extras(draw: st.DrawFn) -> dict[str, object]:
    known = {
        "attention_dropout": draw(st.floats(0, 0.5)),
        "bos_token_id": draw(st.none() | st.integers(0, 9)),
        "eos_token_id": draw(st.none() | st.integers(0, 9) | st.just([1, 2])),
        "initializer_range": draw(st.floats(0, 1)),
        "pad_token_id": draw(st.none() | st.integers(0, 9)),
        "use_cache": draw(st.booleans()),
    }
    return {**known, **draw(st.sampled_from([{}, {"remark": ["a", {"b": None}]}]))}


@st.composite
def experts(draw: st.DrawFn, family: type[MoeConfig], layers: int, width: int) -> dict[str, Any]:
    number = draw(st.integers(2, 8))
    own = draw(sizes) if family.has_expert_width() else width
    values: dict[str, Any] = {
        "num_experts": number,
        "experts_per_token": draw(choices(family, number)),
        "expert_intermediate_size": own,
        **draw(gate_values(family)),
        "shared_expert_intermediate_size": draw(shared_widths(family, own)),
        "output_router_logits": draw(st.booleans()),
    }
    if family.key("router_aux_loss_coef"):
        values["router_aux_loss_coef"] = draw(st.floats(0, 1))
    if family is MixtralConfig:
        values["router_jitter_noise"] = draw(st.floats(0, 1))
    if family.sparse_style == "leading":
        values["mlp_only_layers"] = tuple(range(draw(st.integers(0, layers))))
    if family.sparse_style == "step":
        dense = draw(st.sets(st.integers(0, layers - 1)))
        values["decoder_sparse_step"] = draw(st.integers(1, 4))
        values["mlp_only_layers"] = tuple(sorted(dense))
    return values


@given(configs())
@settings(max_examples=examples(100, 300), deadline=None)
def test_reading_what_was_written_gives_the_same_config(config: DecoderConfig) -> None:
    written = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert parse_config(written) == config
    assert parse_config(written).to_json() == written


@given(configs())
@settings(max_examples=100, deadline=None)
def test_either_half_of_what_was_written_suffices(config: DecoderConfig) -> None:
    written = config.to_json()
    four = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    five = {
        key: value
        for key, value in written.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert parse_config(four) == parse_config(five) == config


@given(configs())
@settings(max_examples=100, deadline=None)
def test_rotary_tables_are_positive_and_finite(config: DecoderConfig) -> None:
    length = config.max_position_embeddings
    found = rotary_frequencies(
        config.rope, config.head_dim, max_position_embeddings=length, length=2 * length
    )
    assert len(found) == config.head_dim // 2
    assert all(math.isfinite(frequency) and frequency > 0 for frequency in found)
    assert math.isfinite(attention_factor(config.rope))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(["silu", "yarn", "full_attention", "\x1b[0m", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "truncate", "x"]), inner
        )
    ),
    max_leaves=6,
)


@given(configs(), st.data())
@settings(max_examples=examples(150, 400), deadline=None)
def test_no_value_makes_it_fail_otherwise_than_with_problems(
    config: DecoderConfig, data: st.DataObject
) -> None:
    written: dict[str, object] = config.to_json()
    keys = st.sampled_from([*written, "layer_types", "quantization_config", "num_experts"])
    for key in data.draw(st.lists(keys, min_size=1, max_size=4)):
        written[key] = data.draw(anything)
    try:
        read = parse_config(written)
    except InputError as error:
        refusal = error
    else:
        assert parse_config(read.to_json()) == read
        return
    assert refusal.problems
    assert all(problem.where and problem.what for problem in refusal.problems)
    assert "\x1b" not in str(refusal)


@given(st.dictionaries(st.text(max_size=8).map("x_{}".format), anything, max_size=4))
@settings(max_examples=100, deadline=None)
def test_foreign_keys_are_kept_or_refused(foreign: Mapping[str, object]) -> None:
    data = {**foreign, **small("llama")}
    try:
        config = parse_config(data)
    except InputError as error:
        named = {str(problem.where) for problem in error.problems}
    else:
        assert {key: config.extra[key] for key in foreign} == foreign
        return
    # Only what JSON cannot hold is refused.
    assert all(": x_" in where for where in named)
