"""gpt2, gptneox and bert in GGUF, written by the `gguf` package as llama.cpp's converter does."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from shapes_in_gguf import CASES, CHANGES, GOLDEN, write

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.formats.gguf.reader import open_gguf

pytest.importorskip("gguf")


@pytest.mark.parametrize(("case", "architecture"), CASES)
def test_the_model_is_that_of_hugging_face(case, architecture, tmp_path):
    source, file = write(case, architecture, tmp_path)
    golden = load_file(source / "model.safetensors")
    with open_gguf(file) as read:
        assert read.tensors.keys() == {n for n in golden if not n.startswith("pooler")}
        for name in read.tensors:
            assert read.tensors[name].shape == golden[name].shape
            np.testing.assert_array_equal(read.read(name), golden[name], err_msg=name)
            np.testing.assert_array_equal(read.read(name, 1, 3), golden[name][1:3])
    made = []
    for model in (source, file):
        out = tmp_path / "out.npy"
        given = ("--inputs", str(GOLDEN / case / "tokens.npy"), "--outputs", str(out), "--force")
        assert main(["run", str(model), "--backend", "reference", *given]) == 0
        made.append(np.load(out))
    np.testing.assert_array_equal(*made)
    if not CHANGES[case]:
        output = "hidden" if architecture == "bert" else "logits"
        np.testing.assert_allclose(made[1], np.load(GOLDEN / case / f"{output}.npy"), atol=1e-6)


def test_what_is_not_known_is_reported(tmp_path):
    _, file = write("bert_gelu", "bert", tmp_path, causal=True)
    with pytest.raises(InputError, match="tokens do not see later ones"):
        open_gguf(file)
