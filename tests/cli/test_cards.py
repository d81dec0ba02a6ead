"""Model cards: where a model comes from, its licences, and what it is for."""

import shutil

from moecc.formats.manifest import load

from .conftest import GOLDEN, LLAMA

TERMS = "---\nlicense: {}\nextra_gated_prompt: |\n  Do no harm.\n\n  Agreed?\n---\n"


def card_of(folder):
    return (folder / "README.md").read_text()


def front(folder):
    """Return the metadata of a card as YAML reads them."""
    import yaml

    return yaml.safe_load(card_of(folder).split("---\n")[1])


def in_cache(top, name):
    """Return a copy of the tiny llama where the cache of the Hub has a model."""
    folder = top / f"models--{name.replace('/', '--')}" / "snapshots" / "a1b2c3"
    return shutil.copytree(LLAMA, folder)


def test_a_second_conversion_keeps_the_history(cli, tmp_path):
    source, first, second = in_cache(tmp_path, "org/tiny"), tmp_path / "a", tmp_path / "b"
    (source / "README.md").write_text(TERMS.format("other\nlicense_name: mine"))
    cli.convert(source, first)
    assert front(first)["base_model"] == ["org/tiny"]
    assert "# tiny-mixtral\n" in card_of(first)
    cli.convert(first, second, pipeline="", to="st_moe")
    cli.convert(second, tmp_path / "c", pipeline="", to="gguf:llama")
    cli.convert(tmp_path / "c", tmp_path / "d", pipeline="", to="auto")
    expected = {
        "license": "other", "license_name": "mine", "base_model": ["org/tiny"],
        "extra_gated_prompt": "Do no harm.\n\nAgreed?\n",
    }  # fmt: skip
    assert front(second).items() >= expected.items()
    assert "1. tiny was converted through upcycle{experts=4" in card_of(second)
    del expected["extra_gated_prompt"]  # a GGUF file has no place for it
    assert front(tmp_path / "d").items() >= expected.items()
    assert [stage["source"] for stage in load(tmp_path / "d").lineage] == ["tiny", "a", "b"]
    assert "converted, not trained further" in card_of(tmp_path / "d")


def test_of_several_models_all_are_named_with_their_licences(cli, tmp_path, out):
    models = [in_cache(tmp_path, f"org/{name}") for name in "abc"]
    for model, licence in zip(models[:2], ("mit", "[apache-2.0, mit]"), strict=True):
        (model / "README.md").write_text(TERMS.format(licence))
    more = [word for name, model in zip("bc", models[1:], strict=True)
            for word in ("--experts", f"{name}={model}")]  # fmt: skip
    cli.convert(models[0], out, *more, pipeline="upcycle{experts=3 sources=base,b,c}")
    assert front(out)["base_model"] == ["org/a", "org/b", "org/c"]
    assert front(out)["license"] == ["mit", "apache-2.0"]
    assert "of c no licence is known" in card_of(out)
    assert "made from `org/a`, `org/b` and `org/c`" in card_of(out)


def test_a_local_source_is_named_by_the_command(cli, dense, out):
    cli.convert(dense, out, "--base-model", "tiny", code=2, says="expected: ORG/NAME")
    cli.convert(dense, out)
    assert "base_model" not in front(out)
    assert "made from `dense` (`llama`)" in card_of(out)
    cli.convert(dense, out, "--base-model", "org/tiny", "--force")
    assert front(out)["base_model"] == ["org/tiny"]
    assert "--seed 0 --base-model org/tiny\n" in card_of(out)


def test_tensors_that_a_pass_leaves_out_are_not_those_of_no_graph(cli, out):
    cli.convert(GOLDEN / "mixtral_gqa", out, pipeline="prune{keep=2}")
    assert "not converted" not in card_of(out)
