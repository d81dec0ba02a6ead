"""Properties of configs in general: round trips, either spelling, no unforeseen failure."""

import json
import math
from dataclasses import replace

from family_configs import small_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from moecc.families.registry import parse_config
from moecc.families.rope import attention_factor
from tests.support.rotary_tables import rotary_frequencies


@st.composite
def configs(draw):
    """Draw a small config with an element type and keys that moecc only carries along."""
    token = st.none() | st.integers(0, 2)
    extra = {"attention_dropout": draw(st.floats(0, 0.5)), "bos_token_id": draw(token)}
    extra |= {"pad_token_id": None, "eos_token_id": draw(token | st.just([1, 2]))}
    extra |= {"initializer_range": draw(st.floats(0, 1)), "use_cache": draw(st.booleans())}
    extra |= draw(st.sampled_from([{}, {"remark": ["a", {"b": None}]}]))
    dtype = draw(st.sampled_from([None, "float32", "bfloat16"]))
    return replace(draw(small_configs()), dtype=dtype, extra=extra)


@given(configs())
@settings(max_examples=examples(100, 300))
def test_reading_what_was_written_gives_the_same_config(config):
    written = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert parse_config(written) == config
    assert parse_config(written).to_json() == written


@given(configs())
@settings(max_examples=100)
def test_either_half_of_what_was_written_suffices(config):
    written = config.to_json()
    four = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    five = {
        key: value
        for key, value in written.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert parse_config(five) == config
    # The versions read positions differently that these two state as version 4 does.
    if config.model_type not in ("olmo3", "apertus"):
        assert parse_config(four) == config


@given(configs())
@settings(max_examples=100)
def test_rotary_tables_are_positive_and_finite(config):
    length = config.max_position_embeddings
    found = rotary_frequencies(
        config.rope, config.head_dim, max_position_embeddings=length, length=2 * length
    )
    assert len(found) == config.head_dim // 2
    assert all(math.isfinite(frequency) and frequency > 0 for frequency in found)
    assert math.isfinite(attention_factor(config.rope))
