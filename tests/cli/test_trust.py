"""Defects that an attack on the command line found, each as a user meets it."""

import numpy as np
from safetensors.numpy import load_file, save_file


def _predicted(moecc, folder, out):
    pipeline = "upcycle{gates=softmax experts=4 top-k=2 router-std=0.05}"
    done = moecc(
        "convert", folder, out, "-p", pipeline, "--to", "st_moe", "--dry-run", "--format", "json"
    )
    assert done.code == 0, done.err
    return float(done.json()["preserves"]["predicted_error"])


def test_the_predicted_error_reads_the_scale_of_norms(moecc, dense, tmp_path):
    file = dense / "model.safetensors"
    tensors = load_file(file)
    found = []
    for scale in (1.0, 0.1):
        norms = {n: np.full_like(t, scale) for n, t in tensors.items() if "norm" in n}
        save_file(tensors | norms, file, metadata={"format": "pt"})
        found.append(_predicted(moecc, dense, tmp_path / "out"))
    assert found[1] < found[0] / 3
