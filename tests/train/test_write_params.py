"""Parameters of a loop of one's own become a checkpoint that says so."""

from pathlib import Path

import numpy as np
import pytest

import moecc
from moecc.errors import InputError
from moecc.formats.manifest import check_manifest, load
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_gqa"


@pytest.fixture(params=["upcycle{experts=4 top-k=2}", "upcycle{experts=4 top-k=2},roll-layers"])
def model(request):
    with open_model(str(GOLDEN)) as opened:
        run_pipeline(opened.graph, Pipeline.parse(request.param))
        yield opened


def test_what_is_written_is_what_was_given(model, tmp_path):
    given = {n: a + np.float32(0.25) for n, a in dict(model.params()).items()}
    moecc.write_params(model, given, tmp_path / "out", to="mixtral")
    check_manifest(tmp_path / "out")
    with open_model(str(tmp_path / "out")) as again:
        name = "model.embed_tokens.weight"
        np.testing.assert_array_equal(again.params()[name], given[name])
        router = next(
            n for n in again.graph.params if n.endswith("layers.0.block_sparse_moe.gate.weight")
        )
        own = next(a for n, a in given.items() if "router" in n)
        np.testing.assert_array_equal(again.params()[router], own[0] if own.ndim == 3 else own)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not trained further" not in card
    assert "llama\\_gqa was trained by a loop outside of moecc." in card
    assert load(tmp_path / "out").lineage[-1]["outside"] is True


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
