"""The loss of a training step, the optimisers, and where their state lies."""

import numpy as np
import pytest

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.ir.mesh import Mesh
from moecc.plan.step import StepConfig
from moecc.train.batches import TARGETS
from moecc.train.objectives import IGNORED
from moecc.train.recipe import GuardSection, OptimizerSection, Schedule
from moecc.train.settings import COLUMN, ROW, StepSpec
from moecc.types import F32, I32, tensor

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.xla.trace.context import DeviceView  # noqa: E402
from moecc_backends.xla.train.gradients import token_losses  # noqa: E402
from moecc_backends.xla.train.optimizer import DIRECTIONS  # noqa: E402
from moecc_backends.xla.train.step import make_train_step, shared_step  # noqa: E402


@jax.jit
def cross_entropy(logits, targets):
    nll = token_losses(logits, targets, (), DeviceView())["loss.sum"]
    return jnp.sum(jnp.where(targets != IGNORED, nll, 0))


def test_cross_entropy_by_its_definition():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)) * 4, rng.integers(0, 7, (3, 5))
    targets[0, :2] = IGNORED
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = -np.log(np.take_along_axis(shares, np.maximum(targets, 0)[..., None], -1)[..., 0])
    expected = each[targets != IGNORED].sum()
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32))
    assert float(found) == pytest.approx(expected, rel=1e-5)


TIES = [
    # logits, target, whether argmax returns the target
    ([2.0, 2.0, 2.0, 2.0], 0, True),
    ([2.0, 2.0, 2.0, 2.0], 3, False),
    ([1.0, 2.0, 2.0, 0.0], 1, True),
    ([1.0, 2.0, 2.0, 0.0], 2, False),
    ([1.0, 0.0, 3.0, 2.0], 2, True),
    ([1.0, 0.0, 3.0, 2.0], 0, False),
]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_of_equal_logits_argmax_says_which_target_is_hit(shards):
    logits = jnp.asarray([row for row, _, _ in TIES], jnp.float32)
    targets = jnp.asarray([target for _, target, _ in TIES], jnp.int32)
    devices = jax.sharding.Mesh(np.asarray(jax.devices()[:shards]), ("model",))
    view = DeviceView(Mesh((("model", shards),)))
    spec = jax.sharding.PartitionSpec
    hits = jax.jit(jax.shard_map(
        lambda x, y: token_losses(x, y, ("model",), view)["hits"], mesh=devices,
        in_specs=(spec(None, "model"), spec()), out_specs=spec(), check_vma=shards > 1,
    ))(logits, targets)  # fmt: skip
    assert hits.astype(bool).tolist() == [is_hit for _, _, is_hit in TIES]
    assert (jnp.argmax(logits, axis=-1) == targets).tolist() == hits.astype(bool).tolist()


def bigram(vocab=11, embed=8):
    """Return a graph that makes logits of the token alone."""
    graph = Graph("bigram")
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))
    table = graph.param("table", tensor(F32, vocab=vocab, embed=embed))
    head = graph.param("head", tensor(F32, vocab=vocab, embed=embed))
    builder = Builder(graph)
    hidden = builder.embedding(table, tokens, axis="vocab")
    graph.set_output("logits", builder.contract(hidden, head, over="embed"))
    return graph


def bigram_step(graph, name, **options):
    section = OptimizerSection(name, **options.pop("section", {}))
    config = StepConfig(dtype=options.pop("dtype", "f32"))
    spec = StepSpec({"B": 4, "S": 16}, config, section, **options)
    return make_train_step(graph, spec, jax.devices()[:1])


def bigram_batch():
    tokens = np.random.default_rng(1).integers(0, 11, (4, 16)).astype(np.int32)
    return {"tokens": tokens, TARGETS: (tokens * 3 + 1) % 11}


def bigram_params(graph):
    rng = np.random.default_rng(1)
    return {n: rng.normal(size=p.type.shape).astype("f") for n, p in graph.params.items()}


@pytest.mark.parametrize(
    ("shape", "row", "column"),
    [
        # The largest axis is gone from the row, the next from the column.
        ((512, 256), ("embed",), ("vocab",)),
        ((256, 512), ("vocab",), ("embed",)),
        ((256, 256), ("vocab",), ("embed",)),
    ],
)
def test_factored_moments_have_the_axes_that_optax_keeps(shape, row, column):
    import optax

    step = bigram_step(bigram(*shape), "adafactor")
    types = step.optimizer.moment_types
    assert (types[ROW]["head"].names, types[COLUMN]["head"].names) == (row, column)
    initial = optax.scale_by_factored_rms().init({"head": jnp.zeros(shape)})
    assert initial.v_row["head"].shape == types[ROW]["head"].shape
    assert initial.v_col["head"].shape == types[COLUMN]["head"].shape


def test_the_update_of_a_matrix_is_clipped_at_its_root_mean_square():
    """Of Adafactor: to that of the matrix, times what the recipe says, times the rate."""
    graph = bigram()
    params = bigram_params(graph)
    size = float(np.sqrt(np.mean(np.square(params["head"]))))
    for clip in (0.1, 0.5):
        step = bigram_step(graph, "adafactor", section={"update_clip": clip, "decay": 0.0})
        state, _ = step.step(step.init(params), bigram_batch(), jax.random.key(0), 0.01)
        moved = np.asarray(state["params"]["head"]) - params["head"]
        assert np.sqrt(np.mean(np.square(moved))) == pytest.approx(0.01 * clip * size, rel=1e-3)


def test_the_loss_that_is_measured_is_the_one_that_falls():
    """By as much as a small step along the gradients says, z-loss of the output included."""
    graph, batch = bigram(), bigram_batch()
    step = bigram_step(graph, "sgd", output_z=0.5, section={"clip": 0.0, "decay": 0.0})
    state, losses = step.init(bigram_params(graph)), []
    for _ in range(2):
        state, metrics = step.step(state, batch, jax.random.key(0), 1e-2)
        losses.append({name: float(value) for name, value in metrics.items()})
    first, second = losses
    assert first["loss.output_z.scaled"] == pytest.approx(0.5 * first["loss.output_z"])
    expected = 1e-2 * first["gradient_norm"] ** 2
    assert first["loss"] - second["loss"] == pytest.approx(expected, rel=0.05)


def test_a_spike_and_what_is_not_finite_change_nothing_but_counters():
    graph, batch = bigram(), bigram_batch()
    guard = GuardSection(sigma=6.0, window=4)
    step = bigram_step(graph, "adamw", guard=guard)
    state, key = step.init(bigram_params(graph)), jax.random.key(0)
    for _ in range(20):
        state, metrics = step.step(state, batch, key, 0.1)
        assert not metrics["guard.skipped"]
    wrong = {**batch, TARGETS: (batch[TARGETS] + 1) % 11}
    before = jax.tree.map(np.asarray, state)
    state, metrics = step.step(state, wrong, key, 1e-3)
    assert metrics["guard.skipped"]
    assert metrics["guard.spike"]
    assert float(metrics["loss"]) > float(metrics["guard.limit"]) > 0
    after = jax.tree.map(np.asarray, state)
    for part in ("params", "moments"):
        assert jax.tree.all(jax.tree.map(np.array_equal, before[part], after[part]))
    assert (before["guard"]["losses"] == after["guard"]["losses"]).all()
    assert (int(after["guard"]["skipped"]), int(after["guard"]["in_a_row"])) == (1, 1)
    state["params"]["head"] = state["params"]["head"].at[0, 0].set(np.nan)
    table = np.asarray(state["params"]["table"])
    state, metrics = step.step(state, batch, key, 1e-3)
    assert metrics["guard.skipped"]
    assert (np.asarray(state["params"]["table"]) == table).all()
    assert int(state["guard"]["in_a_row"]) == 2


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_step_that_is_not_finite_leaves_every_optimizer_s_moments(name):
    graph, batch = bigram(), bigram_batch()
    step = bigram_step(graph, name, guard=GuardSection())
    state, _ = step.step(step.init(bigram_params(graph)), batch, jax.random.key(0), 1e-3)
    state["params"]["head"] = state["params"]["head"].at[0, 0].set(np.nan)
    before = jax.tree.map(np.asarray, {n: state[n] for n in ("params", "moments")})
    state, metrics = step.step(state, batch, jax.random.key(0), 1e-3)
    assert metrics["guard.skipped"]
    for part, arrays in before.items():
        jax.tree.map(np.testing.assert_array_equal, state[part], arrays)


def test_a_sweep_of_rates_is_traced_once():
    graph = bigram()

    def step(**section):
        spec = StepSpec({"B": 4, "S": 16}, StepConfig(dtype="f32"), OptimizerSection(**section))
        return shared_step(graph, spec, jax.devices()[:1], graph)

    assert step(rate=1e-3) is step(rate=2e-3, schedule=Schedule.WSD, warmup=3, decay_steps=2)
    assert step(rate=1e-3, clip=0.5) is not step(rate=1e-3)
