"""What a step holds in memory: a chunk of logits, one state, gradients of the type asked for."""

import re

import pytest

from moecc.ir import F32, I32, Builder, Graph, tensor
from moecc.train.graphs import MeshPasses, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection

from .small import SGD, make_step

VOCAB, EMBED, BATCH, SEQ = 4096, 16, 8, 64
LOGITS_BYTES = 4 * BATCH * SEQ * VOCAB


def model():
    graph = Graph("wide")
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))
    table = graph.param("table", tensor(F32, vocab=VOCAB, embed=EMBED))
    builder = Builder(graph)
    hidden = builder.embedding(table, tokens, axis="vocab")
    graph.set_output("logits", builder.contract(builder.silu(hidden), table, over="embed"))
    return graph


def step_of(chunk_bytes, update, mesh=None, **settings):
    passes = StepPasses(routed=False, losses=None, rolled=False, mesh=mesh)
    graph, sizes = step_graph(model(), passes), {"B": BATCH, "S": SEQ}
    devices = 1 if mesh is None else 2
    return make_step(graph, sizes, update, devices=devices, chunk_bytes=chunk_bytes, **settings)


def memory(step):
    return step.function.lower(*step.arguments).compile().memory_analysis()


def test_logits_never_are_in_memory_whole():
    adamw = OptimizerSection()
    whole, chunked = (memory(step_of(size, adamw)) for size in (1 << 62, 1 << 18))
    assert whole.temp_size_in_bytes > LOGITS_BYTES
    # A chunk and its gradient, and the gradient of the table twice.
    table_bytes = 4 * VOCAB * EMBED
    assert chunked.temp_size_in_bytes < LOGITS_BYTES / 4 + 4 * table_bytes
    # The state that is given is the state that comes back: parameters and two moments.
    assert chunked.alias_size_in_bytes >= 3 * table_bytes


ALL_REDUCE = re.compile(r'"stablehlo.all_reduce"\(.*?\}\) : \(tensor<(\w+)>\)', re.DOTALL)


def reductions(step):
    """Return the types in which devices add arrays as large as the table, one for each time."""
    text = step.function.lower(*step.arguments).as_text()
    sizes = ALL_REDUCE.findall(text)
    shape = f"{VOCAB}x{EMBED}x"
    return [size.removeprefix(shape) for size in sizes if size.startswith(shape)]


@pytest.mark.parametrize(("wanted", "found"), [(None, "bf16"), ("f32", "f32")])
def test_gradients_are_reduced_in_the_type_that_is_asked_for(wanted, found):
    mesh = MeshPasses("data:2", ("data-parallel",))
    config = {"dtype": "bf16", "reduce_dtype": wanted}
    assert reductions(step_of(1 << 18, SGD, mesh, config=config)) == [found]
