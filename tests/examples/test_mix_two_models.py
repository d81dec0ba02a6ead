"""The example of two models as the experts of one: every command of it works."""

import pytest

from .loading import load

pytest.importorskip("orbax.checkpoint")

example = load("mix_two_models")


@pytest.mark.slow
def test_the_chain_with_few_steps(tmp_path, capsys):
    assert example.main(["--out", str(tmp_path / "out"), "--smoke"]) == 0, capsys.readouterr()
    for name in ("average", "drawn", "fitted"):
        assert (tmp_path / "out" / name / "moecc_receipt.json").is_file()
