"""A program is cut into segments: equal layers are compiled once, parameters fetched as needed."""

import numpy as np
import pytest

from moecc.ir import F32

from .models import GOLDEN, compiled, decoder, open_golden, relative, run_both


@pytest.mark.parametrize(
    ("case", "options", "distinct"),
    [
        # Before the layers, a layer, after the layers; a sparse layer is another one.  Masks are
        # made before the layers, so that another window makes no other layer.
        ("llama_gqa", {}, 3),
        ("llama_gqa", {"experts": 4, "layers": "all"}, 3),
        ("llama_gqa", {"experts": 4, "layers": "1"}, 4),
        ("qwen2_window", {}, 3),
        ("qwen2_moe_step", {}, 4),
    ],
)
def test_equal_layers_are_compiled_once(case, options, distinct):
    graph, params, inputs = decoder(case, **options)
    program = compiled(graph, F32)
    program.run(params, inputs)
    program.run(params, inputs)
    assert len(program._compiled) == distinct
    assert all(f._cache_size() == 1 for f in program._compiled.values())


def test_the_parameters_of_a_model_are_made_one_at_a_time():
    """Asking whether a parameter is there makes none."""
    with open_golden("llama_gqa") as model:
        reads = []
        original = model.checkpoint.read

        def read(name, *rows, **more):
            reads.append(name)
            return original(name, *rows, **more)

        model.checkpoint.read = read
        params = model.params()
        assert "model.norm.weight" in params
        assert "model.norm" not in params
        assert reads == []
        tokens = np.load(GOLDEN / "llama_gqa" / "tokens.npy")
        compiled(model.graph, F32).run(params, {"tokens": tokens})
    assert sorted(reads) == sorted(model.graph.params)


def test_values_that_cross_layers_and_are_returned_stay_alive():
    graph, params, inputs = decoder("llama_gqa")
    norms = [n.results[0] for n in graph if n.op.name == "rms_norm"]
    graph.set_output("first", norms[0])
    graph.set_output("tokens_again", graph.inputs["tokens"])
    graph.set_output("weight", graph.params["model.norm.weight"])
    found, expected = run_both(graph, params, inputs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert relative(found[name], array) <= 1e-12
