"""Moments of optimisers, as optax and T5X have them, read by the names of the model's tensors."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiers import few

from moecc.formats.open import open_checkpoint
from moecc.formats.trees import TreeCheckpoint
from tests.checkpoint.folders import GOLDEN

from .test_orbax import HERE, nested
from .test_t5x import arrays_of, packed, put, scanned, stored, write

ocp = pytest.importorskip("orbax.checkpoint")
optax = pytest.importorskip("optax")
pytestmark = pytest.mark.filterwarnings("ignore")


def opened(place):
    checkpoint = open_checkpoint(place)
    assert isinstance(checkpoint, TreeCheckpoint)
    return checkpoint


def trained(arrays, optimizer, steps=2):
    """Return a training state after some steps on drawn gradients: all of it is optax's."""
    import jax.numpy as jnp

    params = nested({k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()})
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        drawn = {k: jnp.asarray(rng.normal(size=a.shape), "float32") for k, a in arrays.items()}
        _, state = optimizer.update(nested(drawn), state, params)
    return {"params": params, "opt_state": state, "step": jnp.int32(steps)}


@pytest.mark.parametrize("case", few(["qwen3_square", "mixtral_bfloat16"]))
def test_adam_of_maxtext(case, tmp_path):
    """What the moments are of a tensor is what its gradient is of: turned, and scaled."""
    arrays = load_file(HERE / f"{case}.safetensors")
    state = trained(arrays, optax.adamw(1e-3))
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(tmp_path / "0" / "items", state)
    shutil.copy(GOLDEN / case / "config.json", tmp_path)
    adam = state["opt_state"][0]
    with opened(tmp_path) as checkpoint:
        found = checkpoint.moments
        assert (found.optimizer, found.count) == ("adamw", 2)
        for kind, tree, power in (("m", adam.mu, 1), ("v", adam.nu, 2)):
            assert found.of[kind].keys() == checkpoint.tensors.keys()
            # A checkpoint of the moments in place of the parameters reads as they should.
            place = tmp_path / f"as-{kind}"
            like = {"params": tree}
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(place / "0" / "items", like)
            shutil.copy(GOLDEN / case / "config.json", place)
            with opened(place) as parameters:
                for name in checkpoint.tensors:
                    scale = parameters._pieces[name].scale
                    expected = parameters.read(name) / np.float32(scale) ** (power + 1)
                    read = checkpoint.read_moment(kind, name)
                    np.testing.assert_allclose(read, expected, rtol=0 if scale == 1 else 1e-6)
                    part = checkpoint.read_moment(kind, name, 1, 3)
                    np.testing.assert_array_equal(part, read[1:3])


def adafactor_of_t5x(arrays):
    """Return the state that ``adafactor.py`` of t5x keeps of drawn squares of gradients.

    Of two axes the row factor is the mean over the larger, the second of equal ones; of more, the
    mean over all but the batch (experts, layers) and the axis of the model's width.
    """
    rng, made = np.random.default_rng(0), {}
    for path, array in arrays.items():
        squares = rng.random(array.shape).astype(np.float32)
        empty = np.zeros(1, np.float32)
        parts = {"v_row": empty, "v_col": empty, "v": squares, "m": empty}
        width = {"wo": -1, "out": -1}.get(path[-2], 0)
        if array.ndim == 2 and path[-1] in ("kernel", "embedding"):
            d1, d0 = np.argsort(array.shape, kind="stable")
            parts |= {"v": empty, "v_row": squares.mean(d0), "v_col": squares.mean(d1)}
        elif array.ndim > 2:
            axes = [a for a in range(array.ndim) if not _is_batch(a, path)]
            row, column = axes if width == 0 else reversed(axes)
            parts |= {"v": empty, "v_row": squares.mean(column), "v_col": squares.mean(row)}
        made |= {(*path, kind): part for kind, part in parts.items()}
        made[*path, "squares"] = squares
    return made


def _is_batch(axis, path):
    return (axis == 0 and "expert" in path) or (axis == 1 and path[0] == path[1])


def test_adafactor_of_t5x(tmp_path):
    scan = {"encoder": 2}
    golden = write("switch_half", tmp_path / "checkpoint_1", scan=scan)
    shutil.rmtree(tmp_path / "checkpoint_1")
    arrays = arrays_of(golden)
    for stack, size in scan.items():
        arrays = scanned(arrays, stack, size)
    kept = adafactor_of_t5x(arrays)
    state = {"step": packed(np.asarray(7, np.int32))}
    for path, array in kept.items():
        if path[-1] != "squares":
            place = ("state", "param_states", *path)
            (tmp_path / "checkpoint_2").mkdir(exist_ok=True)
            put(state, place[1:], stored(tmp_path / "checkpoint_2", place, array, 3))
    target = tmp_path / "whole"
    write("switch_half", target, scan=scan, state=state)
    for folder in (tmp_path / "checkpoint_2").iterdir():
        shutil.move(folder, target / folder.name)
    with opened(target) as checkpoint:
        found = checkpoint.moments
        assert (found.optimizer, found.count) == ("adafactor", 7)
        factored = {n for n, t in golden.items() if t.ndim == 2 and "relative" not in n}
        assert found.of["v_row"].keys() == found.of["v_col"].keys() == factored
        assert found.of["v"].keys() == golden.keys() - factored
        for name in factored:
            squares = piece_of(checkpoint, kept, name)
            both = set()
            for kind in ("v_row", "v_col"):
                (axis,) = found.of[kind][name].axes
                both.add(axis)
                expected = squares.mean(1 - axis)
                np.testing.assert_allclose(checkpoint.read_moment(kind, name), expected, rtol=1e-6)
            assert both == {0, 1}


def piece_of(checkpoint, kept, name):
    """Return the squares of the gradient of a tensor, as the tensor is cut from its array."""
    piece = checkpoint._pieces[name]
    squares = kept[*piece.key.split(".")[1:], "squares"]
    index = tuple((piece.at or {}).get(a, slice(None)) for a in range(squares.ndim))
    left = [a for a in range(squares.ndim) if a not in (piece.at or {})]
    turned = squares[index]
    order = [left.index(a) for a in (*piece.rows, *piece.columns)]
    return np.ascontiguousarray(turned.transpose(order))
