"""Models that read images or speech, through every command that takes inputs."""

import numpy as np
import pytest
from tiers import few

from .conftest import GOLDEN


@pytest.mark.parametrize(
    ("case", "suffix"), few([("vit_plain", ".npy"), ("whisper_plain", ".npz")])
)
def test_a_model_is_inspected_converted_verified_and_run(case, suffix, moecc, tmp_path):
    source, out, given = GOLDEN / case, tmp_path / "sparse", tmp_path / f"inputs{suffix}"
    names = ("pixels",) if case == "vit_plain" else ("features", "decoder_tokens")
    arrays = {name: np.load(source / f"{name}.npy") for name in names}
    if suffix == ".npy":
        np.save(given, arrays["pixels"])
    else:
        np.savez(given, **arrays)
    seen = moecc("inspect", source, "--format", "json").json()
    assert seen["ffn_blocks"]["convertible"] == seen["layers"]
    assert seen["targets"]["st_moe"]["fits"]
    done = moecc("convert", source, out, "-p", "upcycle{experts=4 top-k=2}", "--to", "st_moe")
    assert done.code == 0, done.err
    verified = moecc("verify", out, "--against", source, "--inputs", given)
    assert verified.code == 0, verified.err
    assert f"{' x '.join(map(str, arrays[names[0]].shape))} {names[0]}" in verified.out
    made = tmp_path / "made.npy"
    done = moecc("run", out, "--inputs", given, "--outputs", made, "--backend", "reference")
    assert done.code == 0, done.err
    golden = np.load(source / f"{'hidden' if case == 'vit_plain' else 'logits'}.npy")
    assert np.abs(np.load(made) - golden).max() <= 1e-6 * np.abs(golden).max()


def test_pixels_of_another_size_or_kind_are_refused(moecc, tmp_path):
    given, made = tmp_path / "pixels.npy", tmp_path / "made.npy"
    for array, words in (
        (np.zeros((2, 3, 8, 8), np.float32), "other sizes than the input"),
        (np.zeros((2, 3, 12), np.float32), "other sizes than the input"),
        (np.zeros((2, 3, 12, 8), np.int32), "does not fit the input"),
    ):
        np.save(given, array)
        done = moecc("run", GOLDEN / "vit_plain", "--inputs", given, "--outputs", made)
        assert done.code == 1
        assert words in done.err
        assert "height=12, width=8" in done.err
    np.save(given, np.load(GOLDEN / "vit_plain" / "pixels.npy")[0])
    done = moecc("run", GOLDEN / "vit_plain", "--inputs", given, "--outputs", made)
    assert done.code == 0, done.err
    assert np.load(made).shape == (1, 7, 12)
    assert moecc("generate", GOLDEN / "whisper_plain", "--prompt", "x").code == 1


@pytest.mark.parametrize("case", few(["vit_plain", "whisper_plain"]))
def test_the_plan_has_the_arguments_of_the_program(moecc, case):
    data = moecc(
        "compile", GOLDEN / case, "--machine", "cpu", "--step", "forward", "--format", "json"
    ).json()
    assert data["predicted"]["arguments_bytes"] == data["memory"]["arguments_bytes"]
