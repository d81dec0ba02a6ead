"""What a command needs beyond the core is named before it begins, all of it at once."""

from importlib.util import find_spec

import pytest

from moecc.support import extras

from .conftest import LLAMA


@pytest.fixture
def bare(monkeypatch):
    """Hide what extras bring."""
    hidden = {name.split(".")[0] for names in extras._MODULES.values() for name in names}
    monkeypatch.setattr(
        extras, "find_spec", lambda name: None if name in hidden else find_spec(name)
    )


@pytest.mark.parametrize(
    ("line", "missing", "package"),
    [
        ("generate MODEL --prompt x", "jax, tokenizers", "'tokenizers>="),
        ("train recipe:upcycle --out OUT", "jax, optax, orbax, tensorstore", "'orbax-checkpoint<"),
        (
            "train recipe:upcycle --out OUT --tensorboard --wandb x",
            "jax, optax, orbax, tensorstore, tensorboardX, wandb",
            "'wandb>=",
        ),
        (
            "train recipe:upcycle --out OUT --tensorboard --wandb x --dry-run",
            "tensorboardX, wandb",
            "'wandb>=",
        ),
        ("plan MODEL --machine cpu:8 --sequence 64 --html OUT", "plotly", "'plotly>="),
        ("compile MODEL --machine v5e-16", "jax", "'jax[tpu]"),
        ("compile MODEL --machine h100 --save OUT", "jax, flatbuffers", "'jax[cuda12-local]"),
    ],
)
@pytest.mark.usefixtures("bare")
def test_all_that_is_missing_is_named(line, missing, package, tmp_path, out, cli):
    command = line.replace("MODEL", str(LLAMA)).replace("OUT", str(out)).split()
    cli(*command, code=4, says=(f" needs {missing}\n  hint: python -m pip install '", package))
    assert list(tmp_path.iterdir()) == []
