"""What a user can get wrong: one message each, with the line of the program."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.errors import InputError, UsageError  # noqa: E402

X = jnp.ones((2, 8))
PARAMS = {"w1": jnp.ones((8, 12)), "w2": jnp.ones((12, 8)), "idle": jnp.ones(3)}
PIPELINE = "upcycle{experts=4}"


def ffn(p, x):
    return jax.nn.silu(x @ p["w1"]) @ p["w2"]


@pytest.fixture(scope="module")
def moe():
    return mx.convert(ffn, PARAMS, X, PIPELINE)


def reads_a_value(p, x):
    return ffn(p, x) if float(x.sum()) > 0 else x


def branches_on_a_value(p, x):
    if x.sum() > 0:
        return x
    return ffn(p, x)


def picks_by_a_value(p, x):
    return ffn(p, x[x[:, 0] > 0])


@pytest.mark.parametrize("function", [reads_a_value, branches_on_a_value, picks_by_a_value])
def test_a_function_that_cannot_be_traced(function):
    with pytest.raises(InputError, match="jax cannot trace the function") as error:
        mx.convert(function, PARAMS, X, PIPELINE)
    assert f"in {function.__name__}" in str(error.value)
    assert "test_bad_input.py:" in str(error.value)


def test_a_function_of_other_parameters():
    """Its weights are closed over: constants."""
    with pytest.raises(InputError, match="uses none of its parameters") as error:
        mx.convert(lambda p, x: ffn(PARAMS, x), PARAMS, X, PIPELINE)
    assert "test_bad_input.py:" in str(error.value)
    assert "constants" in str(error.value)


def test_a_tree_that_changed(moe):
    fewer = {"params": {"w1": PARAMS["w1"]}, "moe": moe.params["moe"]}
    with pytest.raises(InputError, match="another tree than the one that was converted") as error:
        moe(ffn)(fewer, X)
    assert "in ffn" in str(error.value)
    for other in (PARAMS, {"params": moe.params["params"], "moe": [1]}):
        with pytest.raises(InputError, match="not the parameters of a conversion") as error:
            moe(ffn)(other, X)
        assert "test_bad_input.py:" in str(error.value)


ROUTER = "ffn.router.weight"


@pytest.mark.parametrize(
    ("where", "name", "array", "found"),
    [
        ("params", "w1", PARAMS["w1"], "[8, 12]"),
        ("params", "w1", jnp.ones((3, 8, 12)), "[3, 8, 12]"),
        ("params", "w2", None, "NoneType"),
        ("moe", ROUTER, jnp.ones((3, 8)), "[3, 8]"),
    ],
)
def test_arrays_of_other_shapes(moe, tmp_path, where, name, array, found):
    """Fewer experts than the router chooses among would be another function, without a word."""
    params = {**moe.params, where: {**moe.params[where], name: array}}
    with pytest.raises(InputError, match="another shape than the conversion gave it") as error:
        moe(ffn)(params, X)
    (problem,) = error.value.problems
    assert problem.found == found
    assert f"in ffn, {where} {name}" in str(problem.where)
    with pytest.raises(InputError, match="another shape"):
        moe.save(tmp_path / "a", params)


def test_a_router_that_is_missing(moe):
    with pytest.raises(InputError, match="another shape") as error:
        moe(ffn)({"params": moe.params["params"], "moe": {}}, X)
    assert f"moe {ROUTER}" in str(error.value)


def test_what_is_no_function_and_what_returns_no_arrays():
    with pytest.raises(UsageError, match="not a function"):
        mx.convert(3, PARAMS, X, PIPELINE)
    with pytest.raises(InputError, match="returns what is no array") as error:
        mx.convert(lambda p, x: {"y": ffn(p, x), "kind": "text"}, PARAMS, X, PIPELINE)
    assert "str at kind" in str(error.value)
    assert "test_bad_input.py:" in str(error.value)


def test_options_that_are_rarely_intended_are_remarked():
    report = mx.convert(ffn, PARAMS, X, "upcycle{experts=4 top-k=1}").report
    assert any("option top-k: the gate of one expert" in remark for remark in report.remarks)


def test_pipelines_and_lowerings_that_do_not_fit(moe):
    with pytest.raises(UsageError, match="no pipeline was given"):
        mx.convert(ffn, PARAMS, X)
    with pytest.raises(UsageError, match="expert"):
        mx.convert(ffn, PARAMS, X, "upcycle{experts=2 top-k=3}")
    with pytest.raises(InputError, match=r"or convert\(…, causal=False\) for an encoder"):
        mx.convert(ffn, PARAMS, X, "upcycle{experts=4 routing=expert-choice}")
    for option in ("router-init=centroids", "split=activation"):
        with pytest.raises(InputError, match="which moecc captures of its own families alone"):
            mx.convert(ffn, PARAMS, X, f"upcycle{{experts=4 {option}}}")
    with pytest.raises(InputError, match="dispatch=gather"):
        moe(ffn, dispatch="gather")
    with pytest.raises(UsageError, match="dispatch lowering"):
        moe(ffn, dispatch="fast")
    with pytest.raises(InputError, match="the parameters have no array"):
        mx.convert(ffn, {}, X, PIPELINE)
    variable = type("Parameter", (), {"__module__": "penzai.core.variables"})
    with pytest.raises(InputError, match="unbind_params"):
        mx.convert(ffn, {"w1": variable()}, X, PIPELINE)


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (("batch", "embed"), UsageError, "`tokens` is no mapping"),
        ({"x": 3}, InputError, "not names of axes"),
        ({"x": (0,)}, InputError, "not names of axes"),
        ({"x": "batch"}, InputError, "one word"),
        ({0: ("batch",)}, InputError, "no such argument"),
    ],
)
def test_tokens_of_another_kind(tokens, error, words):
    with pytest.raises(error, match=words):
        mx.convert(ffn, PARAMS, X, PIPELINE, tokens=tokens)


def test_a_mesh_as_jax_makes_it_by_default(moe):
    """Its axes are explicit, and XLA's partitioner is to place what is between."""
    mesh = jax.make_mesh((2, 2), ("data", "expert"), devices=jax.devices()[:4])
    found = jax.jit(moe(ffn, mesh=mesh))(moe.params, jnp.ones((4, 8)))
    assert jnp.allclose(found, ffn(PARAMS, jnp.ones((4, 8))), rtol=1e-5)
    with pytest.raises(UsageError, match="not a mesh of devices"):
        moe(ffn, mesh="data:2")


def test_keys_of_another_kind():
    passes = "st-moe{experts=4 layers=all extra-ffn=none},specialize{mode=train}"
    made = mx.convert(ffn, PARAMS, X, passes)
    for key in (jax.random.PRNGKey(0), 0, jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(InputError, match="this is no key of jax's"):
            made(ffn)(made.params, X, moe_inputs={"key": key})


def test_inputs_of_the_graph_that_are_missing():
    pipeline = "upcycle{experts=4 top-k=2},specialize{mode=train jitter=0.01}"
    moe = mx.convert(ffn, PARAMS, X, pipeline)
    with pytest.raises(InputError, match="takes other inputs than were given") as error:
        moe(ffn)(moe.params, X)
    assert "moe_inputs=" in str(error.value)
    with pytest.raises(InputError, match="takes other inputs"):
        moe(ffn)(moe.params, X, moe_inputs={"ghost": 1})
