"""Routing on the command line: what contradicts itself is refused or warned of, with a way out."""

import re

import numpy as np
import pytest

from .conftest import GOLDEN, LLAMA

REFUSED = [  # pipeline, exit code, parts of the message
    # wrong by itself, so told when the pipeline is read
    ("upcycle{experts=4 top-k=5}", 2, ("1 <= top-k <= experts=4", "ST-MoE has top-k=2")),
    ("st-moe{experts=1}", 2, ("at least two experts",)),
    ("st-moe{layers=every:half}", 2, ("every:half cannot be read",)),
    ("st-moe{z-coef=-1.0}", 2, ("at least 0",)),
    ("specialize{jitter=1.0}", 2, ("out of range",)),
    ("specialize{dropout=1.0}", 2, ("at least 0, less than 1",)),
    ("specialize{policy=none threshold=0.1}", 2, ("compares with no threshold",)),
    ("upcycle{slots=capacity capacity-factor=0.0}", 2, ("1.25 in training, 2.0 at evaluation",)),
    ("specialize{capacity-factor=0.0}", 2, ("1.25 in training, 2.0 at evaluation",)),
    ("st-moe{train-capacity-factor=0.0}", 2, ("1.25 in training, 2.0 at evaluation",)),
    ("specialize{group-size=0}", 2, ("at least 1", "2 to 8 sequences")),
    ("specialize{groups=2 group-size=8}", 2, ("by their number or by their size",)),
    ("upcycle{routing=expert-choice decoder-layers=all}", 2, ("later ones", "Appendix D")),
    ("upcycle{routing=soft layers=decoder.layers.*}", 2, ("later ones", "Appendix D")),
    ("st-moe{top-k=1}", 2, ("the router would not learn", "top-k=2, as the paper has it")),
    (
        "upcycle{top-k=1 gates=switch},specialize{policy=threshold}", 2,
        ("there are none", "policy=random threshold=0.2"),
    ),
    ("upcycle,specialize{expert-dropout=0.1}", 2, ("capacity-factor=1.25",)),
    ("upcycle{routing=prototypes experts=8 top-k=3}", 2, ("a divisor of experts=8",)),
    ("upcycle{routing=hash gates=sigmoid}", 2, ("a hash has no scores",)),
    ("upcycle{balance-bias gates=ones}", 2, ("DeepSeek-V3",)),
    ("specialize{mode=eval jitter=0.01}", 2, ("an evaluation is not perturbed",)),
    ("specialize{dropless capacity-factor=1.0}", 2, ("contradicting dropless",)),
    ("st-moe{layers=all},add-losses", 2, ("losses are added once", "losses=false")),
    ("upcycle,trace-routing,trace-routing", 2, ("traced once",)),
    ("freeze", 2, ("groups or only", "groups=moe")),
    ("upcycle{routing=noisy}", 2, ("'routing' has a value that is none of its choices",)),
    # wrong for this model, a decoder of three layers
    ("upcycle{routing=expert-choice}", 1, ("layers.2.ffn", "routing=token-choice")),
    ("upcycle,specialize{priority}", 1, ("batch-prioritised routing in a decoder", "force=true")),
    ("upcycle{routing=hash},specialize{jitter=0.01}", 1, ("no router to perturb",)),
    ("upcycle{layers=3,7,11}", 1, ("layer 3, 7, 11", "0-2")),
    ("upcycle{layers=all decoder-layers=every:2}", 1, ("encoder-decoder",)),
    ("st-moe", 1, ("none of its 3 dense blocks; layers=every:3 or layers=all",)),
    ("specialize", 1, ("no layer has experts",)),
    (
        "upcycle{experts=4},roll-layers,specialize", 1,
        ("works layer by layer", "unroll-layers before it"),
    ),
    ("add-losses", 1, ("no layer has experts",)),
    ("trace-routing", 1, ("no layer has experts",)),
]  # fmt: skip


@pytest.mark.parametrize(("pipeline", "code", "parts"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_is_refused(cli, dense_graph, out, pipeline, code, parts):
    done = cli("opt", dense_graph, "-p", pipeline, "-o", out, code=code, says=parts)
    assert done.err.startswith("error: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("pipeline", "part"),
    [
        ("upcycle{top-k=1}", "top-k=2, as ST-MoE has it"),
        ("upcycle{capacity-factor=2.0}", "slots=capacity"),
    ],
)
def test_what_is_warned_of(cli, dense_graph, out, pipeline, part):
    done = cli("opt", dense_graph, "-p", pipeline, "-o", out, says=part)
    assert done.err.startswith("warning: upcycle, option ")


@pytest.mark.parametrize(
    ("layers", "decoder", "expected"),
    [
        ("all", "nowhere", ["encoder.layers.0", "encoder.layers.1"]),
        ("nowhere", "last:1", ["decoder.layers.2"]),
        ("first:1", "middle:1", ["encoder.layers.0", "decoder.layers.1"]),
        ("every:2", "0,2", ["encoder.layers.1", "decoder.layers.0", "decoder.layers.2"]),
    ],
)
def test_placement_in_encoder_and_decoder(cli, tmp_path, layers, decoder, expected):
    dense, out = tmp_path / "t5.moe", tmp_path / "out.moe"
    cli("import", GOLDEN / "t5_gated_untied", "-o", dense)
    pipeline = f"upcycle{{layers={layers} decoder-layers={decoder}}}"
    cli("opt", dense, "-p", pipeline, "-o", out)
    assert re.findall(r" = dispatch .*@(.*)\.ffn", out.read_text()) == expected


def test_groups_that_do_not_divide_the_batch(cli, tmp_path, out):
    ids = tmp_path / "ids.npy"
    pipeline = "upcycle{experts=4},specialize{mode=eval capacity-factor=2.0 group-size=8}"
    cli.convert(LLAMA, out, pipeline=pipeline, to="st_moe")
    command = ("run", out, "--inputs", ids, "--outputs", tmp_path / "y.npy")
    np.save(ids, np.arange(12).reshape(2, 6))
    says = ("layers.0.ffn", "a multiple of 8 tokens", "12", "choose a group size")
    cli(*command, code=1, says=says)
    np.save(ids, np.arange(12).reshape(2, 6).repeat(2, 0))
    cli(*command)
