"""`moecc lint`: what the paper advises against, with its section; nothing on its own choices."""

import re

import pytest

PIPELINES = [
    ("upcycle{experts=512}", "more experts than help", "section 5.1"),
    ("upcycle{experts=8 slots=capacity capacity-factor=9}", "more slots than", "section 2"),
    ("upcycle{router-std=2}", "router's weights begin far", "section 6.2"),
    ("upcycle{router-init=switch router-std=0.001}", "router's logits begin far", "section 6.2"),
    ("upcycle{gates=softmax}", "not renormalised", "appendix G"),
    ("add-losses{balance-coef=0}", "balance loss is off", "appendix A"),
    ("add-losses{balance=none}", "balance loss is off", "appendix A"),
    ("add-losses{balance-coef=1}", "balance loss is a hundred times off", "appendix A"),
    ("add-losses{z-coef=0}", "router z-loss is off", "section 3.3"),
    ("add-losses{z-coef=0.1}", "z-loss is a hundred times off", "section 3.3"),
    ("specialize{mode=train jitter=0.01}", "jitter costs quality", "section 3.2"),
    ("specialize{mode=train input-dropout=0.1}", "router's input costs", "section 3.2"),
    ("specialize{mode=train router-noise=1}", "router's logits costs", "section 3.2"),
    ("specialize{mode=train dropout=0.1}", "dropout costs quality", "section 3.2"),
    ("specialize{mode=train dropout=0.1 expert-dropout=0.05}", "less dropout", "section 4.1"),
    ("freeze{groups=router}", "router is frozen", "appendix A"),
    ("freeze{only=moe}", "experts alone are trained", "section 4.2"),
    ("st-moe{extra-ffn=none}", "no dense sublayer", "appendix C"),
    ("st-moe{expert-bias=none}", "no multiplicative bias", "appendix C"),
    ("st-moe{losses=false}", "no losses are added", "section 3.3"),
    ("st-moe{experts=8 eval-capacity-factor=16}", "more slots than", "section 2"),
]


@pytest.mark.parametrize(("pipeline", "says", "section"), PIPELINES)
def test_what_the_paper_advises_against(cli, pipeline, says, section):
    done = cli("lint", pipeline)
    assert re.search(f"{says}[^!]*?ST-MoE, {section}", done.out), done.out
    cli("lint", pipeline, "--warnings", "error", code=1)


@pytest.mark.parametrize(
    "pipeline",
    [
        "st-moe{experts=32}", "st-moe{experts=8 mode=train}", "upcycle{experts=8 top-k=2}",
        "upcycle{experts=8 gates=switch top-k=1}", "add-losses", "freeze{groups=moe}",
        "specialize{mode=eval dropless=true}",
    ],
)  # fmt: skip
def test_the_choices_of_the_paper_are_passed_over(cli, pipeline):
    done = cli("lint", pipeline, "--warnings", "error")
    assert done.out == "nothing to say against this pipeline\n"


@pytest.mark.parametrize(
    ("pipeline", "says", "section"),
    [
        ("upcycle{experts=4 gates=softmax}", "layers.0.ffn … layers.2.ffn", "appendix G"),
        ("upcycle{experts=4 slots=capacity capacity-factor=5}", "more slots", "section 2"),
        ("upcycle{experts=4 router-std=5}", "logits begin far", "section 6.2"),
        ("upcycle{experts=4},freeze{groups=router}", "router is frozen", "appendix A"),
    ],
)
def test_of_a_model(cli, dense_graph, tmp_path, pipeline, says, section):
    sparse = tmp_path / "sparse.moe"
    cli("opt", dense_graph, "-p", pipeline, "-o", sparse)
    findings = cli.json("lint", sparse)["findings"]
    texts = [" ".join(map(str, finding.values())) for finding in findings]
    assert any(says in text and f"ST-MoE, {section}" in text for text in texts), texts
