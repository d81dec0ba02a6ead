"""The divergence from a teacher: loss and gradients against NumPy."""

import jax
import numpy as np
import pytest
from moecc_backends.xla.program import in_precision
from moecc_backends.xla.train.gradients import COEFFICIENT
from tiers import few

from moecc.train.batches import TARGETS, TEACHER
from moecc.train.objectives import IGNORED
from moecc.train.recipe import LossSection
from moecc.types import F64

from .small import bigram, make_step

VOCAB, EMBED, BATCH, SEQ = 11, 5, 4, 6
WEIGHT = 0.75


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def by_hand(params, batch):
    """Return Σ KL(teacher ‖ model) over targets, and the gradients of the mean loss."""
    hidden = params["table"][batch["tokens"]]
    own = log_softmax(hidden @ params["head"].T)
    taught = log_softmax(batch[TEACHER])
    counted = batch[TARGETS] != IGNORED
    divergence = (np.exp(taught) * (taught - own)).sum(-1)[counted].sum()
    onehot = np.eye(VOCAB)[np.maximum(batch[TARGETS], 0)]
    slope = (np.exp(own) - onehot) + WEIGHT * (np.exp(own) - np.exp(taught))
    slope = np.where(counted[..., None], slope, 0) / counted.sum()
    by_table = np.zeros_like(params["table"])
    np.add.at(by_table, batch["tokens"], slope @ params["head"])
    return divergence, {"table": by_table, "head": np.einsum("bsv,bse->ve", slope, hidden)}


@pytest.mark.parametrize(
    ("micro_batches", "chunk_bytes"),
    few([(2, 4 * VOCAB * 5), (1, 1 << 62), (1, 4 * VOCAB * 5), (2, 1 << 62)]),
)
def test_loss_and_gradients_are_those_of_the_formula(micro_batches, chunk_bytes):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(VOCAB, EMBED)) for name in ("table", "head")}
    batch = {
        name: rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32) for name in ("tokens", TARGETS)
    }
    batch[TEACHER] = rng.normal(0, 2, (BATCH, SEQ, VOCAB))
    batch[TARGETS][1, 2:] = IGNORED
    divergence, slopes = by_hand(params, batch)
    config = {"dtype": "f64", "weight_dtype": "f64", "micro_batches": micro_batches}
    with in_precision(F64):
        step = make_step(
            bigram(VOCAB, EMBED, F64), {"B": BATCH, "S": SEQ}, config=config, distill=True,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip
        inputs = {**batch, COEFFICIENT: np.float32(WEIGHT)}
        found, sums = jax.jit(step.gradients)(params, {}, inputs, jax.random.key(0))
        assert float(sums["distill"]) == pytest.approx(divergence, rel=1e-12)
        for name, slope in slopes.items():
            np.testing.assert_allclose(found[name], slope, rtol=1e-11, atol=1e-14)
        _, metrics = step.step(step.init(params), inputs, jax.random.key(0), 0.0)
        mean = divergence / (batch[TARGETS] != IGNORED).sum()
        assert float(metrics["loss.distill"]) == pytest.approx(mean, rel=1e-6)
        total = metrics["loss.cross_entropy"] + WEIGHT * mean
        assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-6)


def test_the_coefficient_falls_to_zero():
    section = LossSection(0.8, 4)
    assert [round(section.distill_at(n, 9), 9) for n in range(6)] == [0.8, 0.6, 0.4, 0.2, 0, 0]
    assert LossSection(0.8).distill_at(8, 16) == 0.4
