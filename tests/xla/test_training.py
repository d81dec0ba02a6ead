"""The loss of a training step, the optimisers, and where their state lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moecc.errors import InputError, UsageError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.types.dtypes import BF16, F32, I32
from moecc.types.tensor import tensor

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.trace.options import Options  # noqa: E402
from moecc_backends.xla.train.loss import (  # noqa: E402
    IGNORED,
    TARGETS,
    check_trainable,
    cross_entropy,
    loss_function,
)
from moecc_backends.xla.train.optimizer import OPTIMIZERS, moments_like, optimizer  # noqa: E402
from moecc_backends.xla.train.step import train_step  # noqa: E402


def test_cross_entropy_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)) * 4, rng.integers(0, 7, (3, 5))
    targets[0, :2] = IGNORED
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = -np.log(np.take_along_axis(shares, np.maximum(targets, 0)[..., None], -1)[..., 0])
    expected = each[targets != IGNORED].mean()
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_nothing_but_padding_is_zero() -> None:
    targets = jnp.full((2, 3), IGNORED, jnp.int32)
    assert float(cross_entropy(jnp.ones((2, 3, 5)), targets)) == 0


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = jnp.asarray([[1e4, -1e4]], jnp.float32)
    assert float(cross_entropy(logits, jnp.asarray([1], jnp.int32))) == pytest.approx(2e4)


def bigram(vocab: int = 11, embed: int = 8) -> Graph:
    """Return a graph that makes logits of the token alone."""
    graph = Graph("bigram")
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))
    table = graph.param("table", tensor(F32, vocab=vocab, embed=embed))
    head = graph.param("head", tensor(F32, vocab=vocab, embed=embed))
    builder = Builder(graph)
    hidden = builder.embedding(table, tokens, axis="vocab")
    graph.set_output("logits", builder.contract(hidden, head, over="embed"))
    return graph


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_few_steps_learn_which_token_comes_next(name: str) -> None:
    graph, rng = bigram(), np.random.default_rng(1)
    update = optimizer(name, learning_rate=0.05)
    params = {
        n: jnp.asarray(rng.normal(size=p.type.shape), jnp.float32) for n, p in graph.params.items()
    }
    state = params, update.init(params)
    tokens = rng.integers(0, 11, (4, 16)).astype(np.int32)
    inputs = {"tokens": tokens, TARGETS: (tokens * 3 + 1) % 11}
    step = jax.jit(train_step(function(graph), update))
    losses = []
    for _ in range(60):
        state, metrics = step(state, inputs)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 4
    assert np.isfinite(losses).all()


def product_types(platform: str) -> set[tuple[str, ...]]:
    graph = bigram()
    loss = loss_function(function(graph, dtype=BF16, options=Options(platform=platform)))
    params = {n: jnp.ones(p.type.shape) for n, p in graph.params.items()}
    tokens = jnp.ones((4, 16), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
        params, {"tokens": tokens, TARGETS: tokens}
    )
    products = [e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3
    return {tuple(str(v.aval.dtype) for v in (*e.invars, *e.outvars)) for e in products}


def test_products_for_accelerators_are_narrow_forward_and_backward() -> None:
    assert product_types("tpu") == {("bfloat16",) * 3}
    assert product_types("gpu") == {("bfloat16",) * 3}
    # A CPU would sum in the type of the result.
    assert ("bfloat16", "bfloat16", "float32") in product_types("cpu")


def test_what_makes_no_logits_cannot_be_trained() -> None:
    graph = bigram()
    graph.set_output("scores", graph.outputs["logits"])
    graph.drop_output("logits")
    with pytest.raises(InputError, match="needs logits"):
        check_trainable(graph)


def test_an_unknown_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        optimizer("adam_w")


def abstract(shape: tuple[int, ...], *spec: str | None) -> Any:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


@pytest.mark.parametrize(
    ("shape", "spec", "row", "column"),
    [
        # The largest axis is gone from the row, the next from the column.
        ((8, 512, 256), ("data", "model", None), ("data", None), ("data", "model")),
        ((8, 256, 512), ("data", "model", None), ("data", "model"), ("data", None)),
        ((256, 256), ("data", "model"), ("data",), ("model",)),
    ],
)
def test_factored_moments_lie_as_the_axes_that_they_keep(
    shape: tuple[int, ...],
    spec: tuple[str | None, ...],
    row: tuple[str | None, ...],
    column: tuple[str | None, ...],
) -> None:
    moments = moments_like(optimizer("adafactor"), {"w": abstract(shape, *spec)})
    found = {
        tuple(getattr(k, "name", getattr(k, "key", None)) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(moments)
    }
    rows = [leaf for path, leaf in found.items() if "v_row" in path]
    columns = [leaf for path, leaf in found.items() if "v_col" in path]
    assert [leaf.sharding.spec for leaf in rows] == [PartitionSpec(*row)]
    assert [leaf.sharding.spec for leaf in columns] == [PartitionSpec(*column)]
    order = np.argsort(shape)
    assert rows[0].shape == tuple(np.delete(shape, order[-1]))
    assert columns[0].shape == tuple(np.delete(shape, order[-2]))


def test_moments_of_adamw_lie_as_their_parameters() -> None:
    params = {"w": abstract((8, 16), "data", None), "b": abstract((16,), "model")}
    moments = moments_like(optimizer("adamw"), params)
    specs = {
        str(leaf.shape): leaf.sharding.spec
        for leaf in jax.tree.leaves(moments)
        if leaf.shape in ((8, 16), (16,))
    }
    assert specs == {"(8, 16)": PartitionSpec("data", None), "(16,)": PartitionSpec("model")}
