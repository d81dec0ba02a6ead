"""The loss of a training step, the optimisers, and where their state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moecc_backends.xla.trace.context import DeviceView
from moecc_backends.xla.train.gradients import token_losses
from moecc_backends.xla.train.optimizer import DIRECTIONS
from moecc_backends.xla.train.step import shared_step

from moecc.ir.mesh import Mesh
from moecc.plan.step import StepConfig
from moecc.train.batches import TARGETS
from moecc.train.objectives import IGNORED
from moecc.train.recipe import GuardSection, OptimizerSection, Schedule
from moecc.train.settings import COLUMN, ROW, StepSpec
from tests.xla.models import normal

from .small import bigram, make_step


def test_cross_entropy_by_its_definition():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)) * 4, rng.integers(0, 7, (3, 5))
    targets[0, :2] = IGNORED
    is_counted = targets != IGNORED
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = -np.log(np.take_along_axis(shares, np.maximum(targets, 0)[..., None], -1)[..., 0])
    losses = jax.jit(lambda x, y: token_losses(x, y, (), DeviceView())["loss.sum"])
    found = losses(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32))
    assert float(found[is_counted].sum()) == pytest.approx(each[is_counted].sum(), rel=1e-5)


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
    logits, targets, expected = map(jnp.asarray, zip(*TIES, strict=True))
    devices = jax.sharding.Mesh(np.asarray(jax.devices()[:shards]), ("model",))
    view = DeviceView(Mesh((("model", shards),)))
    spec = jax.sharding.PartitionSpec
    hits = jax.jit(jax.shard_map(
        lambda x, y: token_losses(x, y, ("model",), view)["hits"], mesh=devices,
        in_specs=(spec(None, "model"), spec()), out_specs=spec(), check_vma=shards > 1,
    ))(logits, targets)  # fmt: skip
    assert (hits.astype(bool) == expected).all()
    assert ((jnp.argmax(logits, axis=-1) == targets) == expected).all()


GRAPH = bigram()
SIZES = {"B": 4, "S": 16}
PARAMS = normal(np.random.default_rng(1), GRAPH.params, "f4")
TOKENS = np.random.default_rng(1).integers(0, 11, (4, 16)).astype(np.int32)
BATCH = {"tokens": TOKENS, TARGETS: (TOKENS * 3 + 1) % 11}


def bigram_step(name, graph=GRAPH, section=None, **settings):
    return make_step(graph, SIZES, OptimizerSection(name, **(section or {})), **settings)


def train(step, state, batch=BATCH, rate=1e-3):
    return step.step(state, batch, jax.random.key(0), rate)


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
    types = bigram_step("adafactor", bigram(*shape)).optimizer.moment_types
    assert (types[ROW]["head"].names, types[COLUMN]["head"].names) == (row, column)
    initial = optax.scale_by_factored_rms().init({"head": jnp.zeros(shape)})
    assert initial.v_row["head"].shape == types[ROW]["head"].shape
    assert initial.v_col["head"].shape == types[COLUMN]["head"].shape


@pytest.mark.parametrize("clip", [0.1, 0.5])
def test_the_update_of_a_matrix_is_clipped_at_its_root_mean_square(clip):
    """Of Adafactor: to that of the matrix, times what the recipe says, times the rate."""
    step = bigram_step("adafactor", section={"update_clip": clip, "decay": 0.0})
    state, _ = train(step, step.init(PARAMS), rate=0.01)
    moved = np.asarray(state["params"]["head"]) - PARAMS["head"]
    size = float(np.sqrt(np.mean(np.square(PARAMS["head"]))))
    assert np.sqrt(np.mean(np.square(moved))) == pytest.approx(0.01 * clip * size, rel=1e-3)


def test_the_loss_that_is_measured_is_the_one_that_falls():
    """By as much as a small step along the gradients says, z-loss of the output included."""
    step = bigram_step("sgd", output_z=0.5, section={"clip": 0.0, "decay": 0.0})
    state, first = train(step, step.init(PARAMS), rate=1e-2)
    _, second = train(step, state, rate=1e-2)
    scaled = float(first["loss.output_z.scaled"])
    assert scaled == pytest.approx(0.5 * float(first["loss.output_z"]))
    expected = 1e-2 * float(first["gradient_norm"]) ** 2
    assert float(first["loss"] - second["loss"]) == pytest.approx(expected, rel=0.05)


def test_a_spike_and_what_is_not_finite_change_nothing_but_counters():
    step = bigram_step("adamw", guard=GuardSection(window=4))
    state = step.init(PARAMS)
    for _ in range(20):
        state, metrics = train(step, state, rate=0.1)
        assert not metrics["guard.skipped"]
    before = jax.tree.map(np.asarray, state)
    state, metrics = train(step, state, {**BATCH, TARGETS: (BATCH[TARGETS] + 1) % 11})
    assert metrics["guard.skipped"]
    assert metrics["guard.spike"]
    assert float(metrics["loss"]) > float(metrics["guard.limit"]) > 0
    after = jax.tree.map(np.asarray, state)
    for part in ("params", "moments"):
        assert jax.tree.all(jax.tree.map(np.array_equal, before[part], after[part]))
    assert (before["guard"]["losses"] == after["guard"]["losses"]).all()
    assert (int(after["guard"]["skipped"]), int(after["guard"]["in_a_row"])) == (1, 1)
    state["params"]["head"] = state["params"]["head"].at[0, 0].set(np.nan)
    state, metrics = train(step, state)
    assert metrics["guard.skipped"]
    assert (np.asarray(state["params"]["table"]) == after["params"]["table"]).all()
    assert int(state["guard"]["in_a_row"]) == 2


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_step_that_is_not_finite_leaves_every_optimizer_s_moments(name):
    step = bigram_step(name)
    state, _ = train(step, step.init(PARAMS))
    state["params"]["head"] = state["params"]["head"].at[0, 0].set(np.nan)
    before = jax.tree.map(np.asarray, {n: state[n] for n in ("params", "moments")})
    state, metrics = train(step, state)
    assert metrics["guard.skipped"]
    for part, arrays in before.items():
        jax.tree.map(np.testing.assert_array_equal, state[part], arrays)


def test_a_sweep_of_rates_is_traced_once():
    def step(**section):
        spec = StepSpec(SIZES, StepConfig(dtype="f32"), OptimizerSection(**section))
        return shared_step(GRAPH, spec, jax.devices()[:1], GRAPH)

    assert step(rate=1e-3) is step(rate=2e-3, schedule=Schedule.WSD, warmup=3, decay_steps=2)
    assert step(rate=1e-3, clip=0.5) is not step(rate=1e-3)
