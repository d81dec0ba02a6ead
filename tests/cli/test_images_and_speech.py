"""Models that read images or speech, through every command that takes inputs."""

import numpy as np
import pytest
from tiers import few

from .conftest import GOLDEN


@pytest.mark.parametrize(
    ("case", "inputs", "output"),
    few([
        ("vit_plain", ["pixels"], "hidden"),
        ("whisper_plain", ["features", "decoder_tokens"], "logits"),
    ]),
)  # fmt: skip
def test_a_model_is_inspected_converted_verified_and_run(case, inputs, output, cli, tmp_path):
    source, out, result = GOLDEN / case, tmp_path / "sparse", tmp_path / "result.npy"
    arrays = {name: np.load(source / f"{name}.npy") for name in inputs}
    # One array is given as it is, several in an archive.
    file = source / f"{inputs[0]}.npy"
    if len(inputs) > 1:
        file = tmp_path / "inputs.npz"
        np.savez(file, **arrays)
    report = cli.json("inspect", source)
    assert report["ffn_blocks"]["convertible"] == report["layers"]
    assert report["targets"]["st_moe"]["fits"]
    cli.convert(source, out, to="st_moe")
    shape = " x ".join(map(str, arrays[inputs[0]].shape))
    verified = cli("verify", out, "--against", source, "--inputs", file)
    assert f"{shape} {inputs[0]}" in verified.out
    cli("run", out, "--inputs", file, "--outputs", result, "--backend", "reference")
    golden = np.load(source / f"{output}.npy")
    assert np.abs(np.load(result) - golden).max() <= 1e-6 * np.abs(golden).max()


def test_pixels_of_another_size_or_kind_are_refused(cli, tmp_path):
    pixels, result, model = tmp_path / "pixels.npy", tmp_path / "result.npy", GOLDEN / "vit_plain"
    command = ("run", model, "--inputs", pixels, "--outputs", result)
    for array, words in (
        (np.zeros((2, 3, 8, 8), np.float32), "other sizes than the input"),
        (np.zeros((2, 3, 12), np.float32), "other sizes than the input"),
        (np.zeros((2, 3, 12, 8), np.int32), "does not fit the input"),
    ):
        np.save(pixels, array)
        cli(*command, code=1, says=(words, "height=12, width=8"))
    np.save(pixels, np.load(model / "pixels.npy")[0])
    cli(*command)
    assert np.load(result).shape == (1, 7, 12)
    cli("generate", GOLDEN / "whisper_plain", "--prompt", "x", code=1)


@pytest.mark.parametrize("case", few(["vit_plain", "whisper_plain"]))
def test_the_plan_has_the_arguments_of_the_program(cli, case):
    report = cli.json("compile", GOLDEN / case, "--machine", "cpu", "--step", "forward")
    assert report["predicted"]["arguments_bytes"] == report["memory"]["arguments_bytes"]
