"""Defects that an attack on the command line found, each as a user meets it."""

from .conftest import edited_tensors


def test_the_predicted_error_reads_the_scale_of_norms(cli, dense, out):
    pipeline = "upcycle{gates=softmax experts=4 top-k=2 router-std=0.05}"
    errors = []
    for scale in (1.0, 0.1):
        with edited_tensors(dense) as tensors:
            for name in tensors:
                if "norm" in name:
                    tensors[name][:] = scale
        plan = cli.dry_run(dense, out, pipeline=pipeline, to="st_moe")
        errors.append(float(plan["preserves"]["predicted_error"]))
    assert errors[1] < errors[0] / 3
