"""What a step holds in memory: a chunk of logits, one state, gradients of the type asked for."""

import re

import pytest

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.plan.step import StepConfig
from moecc.train.graphs import MeshPasses, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import StepSpec
from moecc.types import F32, I32, tensor

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.train.step import make_train_step  # noqa: E402

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


def step_of(chunk_bytes, name="adamw", **options):
    passes = StepPasses(routed=False, losses=None, rolled=False, mesh=options.pop("mesh", None))
    sizes = {"B": BATCH, "S": options.pop("length", SEQ)}
    config = StepConfig(**{"dtype": "f32", **options})
    spec = StepSpec(sizes, config, OptimizerSection(name), chunk_bytes=chunk_bytes)
    count = 1 if passes.mesh is None else 2
    return make_train_step(step_graph(model(), passes), spec, jax.devices()[:count])


def compiled(step):
    return step.function.lower(*step.arguments).compile()


def test_logits_never_are_in_memory_whole():
    whole, chunked = (compiled(step_of(size)).memory_analysis() for size in (1 << 62, 1 << 18))
    assert whole.temp_size_in_bytes > LOGITS_BYTES
    # A chunk and its gradient, and the gradient of the table twice.
    table_bytes = 4 * VOCAB * EMBED
    assert chunked.temp_size_in_bytes < LOGITS_BYTES / 4 + 4 * table_bytes
    # The state that is given is the state that comes back.
    state_bytes = 3 * table_bytes
    assert chunked.alias_size_in_bytes >= state_bytes


ALL_REDUCE = re.compile(r'"stablehlo.all_reduce"\(.*?\}\) : \(tensor<(\w+)>\)', re.DOTALL)


def reductions(step):
    """Return the types in which devices add arrays as large as the table, one for each time."""
    text = step.function.lower(*step.arguments).as_text()
    sizes = ALL_REDUCE.findall(text)
    shape = f"{VOCAB}x{EMBED}x"
    return [size.removeprefix(shape) for size in sizes if size.startswith(shape)]


def test_gradients_are_reduced_in_the_type_that_is_asked_for():
    mesh = MeshPasses("data:2", ("data-parallel",))
    for wanted, found in ((None, ["bf16"]), ("f32", ["f32"])):
        step = step_of(1 << 18, "sgd", mesh=mesh, dtype="bf16", reduce_dtype=wanted)
        assert reductions(step) == found
