"""States have the names of the model, whatever passes made of its graph."""

import numpy as np
import pytest

from moecc.ir import clone
from moecc.model.open import open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.state import canonical, initial, moment, stored
from moecc.weights.evaluate import evaluate

ROLLED = "cse,roll-layers"


def run(graph, passes):
    run_pipeline(graph, Pipeline.parse(passes), context=Context(allow_unmatched=True))
    return graph


@pytest.fixture(scope="module")
def model():
    with open_model("tests/golden/llama_gqa") as opened:
        run(opened.graph, "upcycle{experts=4 top-k=2}")
        yield opened


@pytest.fixture(scope="module")
def made(model):
    return canonical(model.graph)


def test_the_canonical_graph_reads_its_parameters_by_their_own_names(made):
    for name, param in made.graph.params.items():
        assert str(param.weight).startswith(f'source("{name}" : f32[')


def test_a_rolled_model_has_the_same_canonical_graph(model, made):
    rolled = run(clone(model.graph), "roll-layers")
    assert any("{" in name for name in rolled.params)
    assert canonical(rolled).graph.params.keys() == made.graph.params.keys()


def test_what_is_stored_of_a_rolled_program_restores_it(model, made):
    program, arrays, tensors = run(clone(made.graph), ROLLED), {}, {}

    def read(key, *rows):
        return tensors[key][slice(*rows)]

    for name, param in program.params.items():
        arrays[name] = evaluate(initial(param.weight, made.weights), model.checkpoint.read)
        for key, part in stored("array", param.weight):
            tensors[key] = evaluate(part, lambda _, *rows, a=arrays[name]: a[slice(*rows)])
    assert tensors.keys() == made.graph.params.keys()
    for name, param in program.params.items():
        np.testing.assert_array_equal(evaluate(param.weight, read), arrays[name])
    for name, weight in made.weights.items():
        np.testing.assert_array_equal(tensors[name], evaluate(weight, model.checkpoint.read))


@pytest.mark.parametrize("dropped", [None, "mlp", "embed"])
def test_moments_go_the_ways_of_their_parameters(made, dropped):
    name = "model.layers.{0..2}.mlp.up_proj.weight"
    param = run(clone(made.graph), ROLLED).params[name]
    shape = (param.type if dropped is None else param.type.without(dropped)).shape
    carried = moment(param.weight, "mu", shape)
    assert carried.type.shape == shape
    assert [key for key, _ in stored("array", carried)] == [
        f"mu.model.layers.{n}.mlp.up_proj.weight" for n in range(3)
    ]
