"""A decoder in plain jnp on a tiny Llama: converted, equal to what the family gives, trained."""

from pathlib import Path

import pytest

pytest.importorskip("jax")

from .loading import load

GOLDEN = Path(__file__).parents[1] / "golden"

example = load("upcycle_any_jax")


@pytest.mark.slow
def test_it_is_the_function_that_the_family_gives(capsys):
    assert example.main(["--model", str(GOLDEN / "llama_gqa"), "--every", "1", "--steps", "2"]) == 0
    assert "blocks converted" in capsys.readouterr().out
