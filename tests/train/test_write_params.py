"""Parameters of a loop of one's own become a checkpoint that says so."""

import numpy as np
import pytest

import moecc
from moecc.errors import InputError
from moecc.formats.manifest import check_manifest, load
from moecc.model.open import open_model

from .tiny import GOLDEN, piped


@pytest.fixture(params=["upcycle{experts=4 top-k=2}", "upcycle{experts=4 top-k=2},roll-layers"])
def model(request):
    with open_model(str(GOLDEN / "llama_gqa")) as opened:
        piped(opened.graph, request.param)
        yield opened


def test_what_is_written_is_what_was_given(model, tmp_path):
    given, out = {n: a + np.float32(0.25) for n, a in model.params().items()}, tmp_path / "out"
    moecc.write_params(model, given, out, to="mixtral")
    check_manifest(out)
    with open_model(str(out)) as again:
        params = again.params()
        name = "model.embed_tokens.weight"
        np.testing.assert_array_equal(params[name], given[name])
        routers = next(a for n, a in given.items() if "router" in n)
        router = next(n for n in params if n.endswith("layers.0.block_sparse_moe.gate.weight"))
        of_layer = routers[0] if routers.ndim == 3 else routers
        np.testing.assert_array_equal(params[router], of_layer)
    card = (out / "README.md").read_text()
    assert "not trained further" not in card
    assert "llama\\_gqa was trained by a loop outside of moecc." in card
    assert load(out).lineage[-1]["outside"] is True


def test_all_that_does_not_fit_is_reported(model, tmp_path):
    given = dict(model.params())
    first, second, *_ = given
    del given[first]
    given[second] = given[second][..., :1]
    given["modle"] = np.ones(3)
    with pytest.raises(InputError) as error:
        moecc.write_params(model, given, tmp_path / "out", to="mixtral")
    assert len(error.value.problems) == 3
    assert not (tmp_path / "out").exists()
