"""Models whose positions are a learned table: no sequence is longer, by default or by request."""

from pathlib import Path

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.families.describe import describe
from moecc.ir.structure import length_bounds
from moecc.model.inputs import check_inputs
from moecc.model.open import open_model
from moecc.plan.workload import make_batch

GOLDEN = Path(__file__).parents[1] / "golden"
BOUNDS = {
    "bert_gelu": {"S": 24}, "gpt2_plain": {"S": 24},
     "whisper_plain": {"T": 14}, "llama_gqa": {}, "vit_plain": {},
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_the_default_length_is_one_that_the_model_has(name):
    with open_model(str(GOLDEN / name)) as model:
        assert length_bounds(model.graph) == BOUNDS[name]
        batch, counted = make_batch(model.graph, 2), describe(model.graph).sequence.lengths
        for variable, most in BOUNDS[name].items():
            assert batch.size(variable) == counted[variable] == most


@pytest.mark.parametrize("name", ["gpt2_plain", "whisper_plain"])
def test_a_longer_sequence_is_rejected(name):
    with open_model(str(GOLDEN / name)) as model:
        (most,) = BOUNDS[name].values()
        assert make_batch(model.graph, 1, lengths=(most,)).tokens % most == 0
        with pytest.raises(InputError, match="longer than the model has positions"):
            make_batch(model.graph, 1, lengths=(most + 1,))


def test_inputs_that_are_too_long_are_rejected_before_they_are_run():
    with open_model(str(GOLDEN / "gpt2_plain")) as model:
        check_inputs(model.graph, {"tokens": np.zeros((2, 24), np.int32)}, "a.npy")
        with pytest.raises(InputError, match="longer than the model has positions") as error:
            check_inputs(model.graph, {"tokens": np.zeros(25, np.int32)}, "a.npy")
    assert error.value.problems[0].expected == "at most 24 tokens"
