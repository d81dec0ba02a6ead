"""The meaning and the lowering of convolutions, against sums written out and against torch's."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.ir import F32, Builder, Graph, tensor, verify

RNG = np.random.default_rng(0)


WINDOWS = {"over": "channel", "along": ("height", "width"), "taps": ("down", "across")}


def patches(**attrs):
    """Return a convolution of images whose axes are in another order than torch's."""
    graph = Graph("patches")
    x = graph.input("x", tensor(F32, batch="B", height=5, channel=3, width=7))
    w = graph.param("w", tensor(F32, embed=4, channel=3, down=3, across=2))
    graph.set_output("y", Builder(graph).convolve(x, w, **WINDOWS | attrs))
    verify(graph)
    return graph


def by_hand(x, w, stride, padding):
    """Return ``[batch, height, width, embed]``, one sum at a time."""
    x = np.pad(x, ((0, 0), (padding, padding), (0, 0), (padding, padding)))
    height = (x.shape[1] - w.shape[2]) // stride + 1
    width = (x.shape[3] - w.shape[3]) // stride + 1
    made = np.zeros((x.shape[0], height, width, w.shape[0]))
    for row, column in np.ndindex(height, width):
        down = slice(row * stride, row * stride + w.shape[2])
        across = slice(column * stride, column * stride + w.shape[3])
        window = x[:, down, :, across].transpose(0, 2, 1, 3)
        made[:, row, column] = np.tensordot(window, w, ([1, 2, 3], [1, 2, 3]))
    return made


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_windows_are_summed_as_by_hand(backend, stride, padding):
    x, w = (RNG.standard_normal(s, np.float32) for s in ((2, 5, 3, 7), (4, 3, 3, 2)))
    graph = patches(stride=stride, padding=padding)
    found = get_backend(backend).compile(graph).run({"w": w}, {"x": x})["y"]
    expected = by_hand(x, w, stride, padding)
    assert graph.outputs["y"].type.names == ("batch", "height", "width", "embed")
    assert found.shape == expected.shape
    assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"taps": ("down",)}, "an axis of the weights for each axis"),
        ({"padding": -1}, "no such windows"),
        ({"over": ()}, "both operands have the axis 'channel'"),
        ({"along": ("width", "height"), "taps": ("down", "deep")}, "has no axis 'deep'"),
    ],
)
def test_what_has_no_windows_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        patches(**changes)
