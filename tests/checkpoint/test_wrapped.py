"""Text models inside wrappers: read alone, converted, and put back with the rest untouched."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moecc
from moecc.errors import InputError
from moecc.formats.open import WrappedText, open_checkpoint
from moecc.ir.text import print_graph
from moecc.jobs.convert import convert, plan, write
from moecc.jobs.inspect import inspection
from moecc.rewrite.pipeline import Pipeline

from .folders import GOLDEN, WEIGHTS, opened_model, read_json, write_json

REST = {
    "vision_tower.patch.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "vision_tower.position_ids": np.arange(4),
    "multi_modal_projector.weight": np.full((3, 2), 0.1, np.float32),
}


def older(name):
    return f"language_model.{name}"


def newer(name):
    return name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)


def wrap(folder, golden, wrapper_type, named=older, **changes):
    """Write a golden text model as a wrapper holds it."""
    folder.mkdir()
    config = read_json(GOLDEN / golden / "config.json")
    text = {**config, "architectures": ["AnyTextModel"], **changes}
    wrapper = {"model_type": wrapper_type, "image_token_id": 3, "vision_config": {"hidden_size": 3}}
    write_json(folder / "config.json", {**wrapper, "text_config": text})
    tensors = load_file(GOLDEN / golden / WEIGHTS)
    save_file({**{named(n): t for n, t in tensors.items()}, **REST}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("named", [older, newer])
def test_mixture_is_put_back_with_the_rest_untouched(tmp_path, named):
    source = wrap(tmp_path / "llava", "llama_gqa", "llava", named)
    with opened_model(source) as model:
        planned = plan(model, Pipeline.parse("upcycle{experts=4}"), "auto")
        assert planned.proof.verdict.status == "proved"
        write(planned, tmp_path / "out")
    before, after = (load_file(f / WEIGHTS) for f in (source, tmp_path / "out"))
    for name in REST:
        assert before[name].tobytes() == after[name].tobytes()
        assert before[name].dtype == after[name].dtype
    assert named("model.layers.0.block_sparse_moe.experts.3.w1.weight") in after
    config = read_json(tmp_path / "out" / "config.json")
    assert config["model_type"] == "llava"
    assert config["text_config"]["model_type"] == "mixtral"
    assert config["vision_config"] == {"hidden_size": 3}
    assert moecc.open(tmp_path / "out").verify(against=source).passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "all of the llava but its text model is kept as it is" in card


def test_engines_that_were_not_tried_with_a_wrapper_have_no_verdict(tmp_path):
    source = wrap(tmp_path / "internvl", "qwen2_square", "internvl")
    with opened_model(source) as model:
        targets = inspection(model)["targets"]
    runs = {v["engine"]: v["runs"] for v in targets["qwen2_moe"]["engines"]}
    assert runs == {"transformers 5": True, "transformers 4": False}


def test_settings_of_a_mixture_that_stays_in_its_family_are_written(tmp_path):
    source = wrap(tmp_path / "llava", "mixtral_gqa", "llava")
    moecc.open(source).apply("prune{keep=2}").save(tmp_path / "out")
    text = read_json(tmp_path / "out" / "config.json")["text_config"]
    assert text["num_local_experts"] == 2
    assert text["architectures"] == ["AnyTextModel"]
    assert moecc.open(tmp_path / "out").graph.attrs["family"] == "mixtral"


def test_adapted_text_model_is_put_back(tmp_path):
    source = wrap(tmp_path / "llava", "llama_gqa", "llava")
    experts = wrap(tmp_path / "other", "llama_gqa", "llava")
    out = tmp_path / "out"
    convert(
        str(source), str(out), pipeline="upcycle{experts=2 sources=a,b top-k=2}", to="mixtral",
        experts=(f"a={experts}", f"b={experts}"),
    )  # fmt: skip
    assert read_json(out / "config.json")["model_type"] == "llava"
    assert REST.keys() <= load_file(out / WEIGHTS).keys()


def test_graph_of_the_user_reads_names_of_the_file(tmp_path):
    source = wrap(tmp_path / "mllama", "llama_gqa", "mllama")
    imported = wrap(tmp_path / "llava", "llama_gqa", "llava")
    text = """moecc 1
graph one {{
  attr checkpoint = "{}"
  param %w : f32[a=2, b=3] = cast(source("vision_tower.patch.weight" : f16[a=2, b=3]), f32)
  output w = %w
}}
"""
    for folder in (source, imported):
        (tmp_path / "one.moe").write_text(text.format(folder))
        with opened_model(tmp_path / "one.moe") as model:
            assert model.params()["w"].shape == (2, 3)
    with opened_model(imported) as model:
        (tmp_path / "all.moe").write_text(print_graph(model.graph))
    with opened_model(tmp_path / "all.moe") as model:
        assert model.params()["model.norm.weight"].ndim == 1


def test_rest_keeps_its_element_type(tmp_path):
    source = wrap(tmp_path / "llava", "llama_gqa", "llava")
    moecc.open(source).save(tmp_path / "out", to="llama", dtype="bf16")
    with open_checkpoint(tmp_path / "out") as saved:
        assert isinstance(saved, WrappedText)
        assert {info.dtype.name for info in saved.tensors.values()} == {"bf16"}
        assert {n: i.dtype.numpy for n, i in saved.others.items()} == {
            n: t.dtype for n, t in REST.items()
        }


def test_wrapper_of_one_family_writes_a_mixture_alone(tmp_path):
    source = wrap(tmp_path / "gemma", "gemma3_local", "gemma3")
    with opened_model(source) as model:
        planned = plan(model, Pipeline.parse("upcycle{experts=4}"), "st_moe")
    assert planned.wrapped is None
    assert any("a gemma3 holds no st_moe" in remark for remark in planned.remarks)
    assert any("a gemma3 holds no st_moe" in note for note in planned.notes)


def test_sections_of_positions_are_those_of_text(tmp_path):
    sections = {"type": "mrope", "mrope_section": [1, 1, 2]}
    source = wrap(
        tmp_path / "qwen", "qwen2_square", "qwen2_5_vl", newer,
        model_type="qwen2_5_vl_text", rope_scaling=sections, rope_parameters=sections,
        rope_theta=1e6,
    )  # fmt: skip
    with opened_model(source) as model:
        assert model.graph.attrs["family"] == "qwen2"
        assert any("with 3 tensors beside it" in remark for remark in model.remarks())


def test_text_model_that_reads_images_is_rejected(tmp_path):
    source = wrap(tmp_path / "mllama", "llama_gqa", "mllama")
    with pytest.raises(InputError, match="layers of its text model attend to images") as caught:
        opened_model(source)
    assert "--via torch" in str(caught.value.problems[0].hint)


def test_wrapper_without_a_text_model_is_rejected(tmp_path):
    source = wrap(tmp_path / "llava", "llama_gqa", "llava")
    write_json(source / "config.json", {"model_type": "llava"})
    with pytest.raises(InputError, match="the config has no text model"):
        opened_model(source)
    text = {"model_type": "qwen3_vl_text", "rope_scaling": {"mrope_section": [1, 1, 2]}}
    config = {"model_type": "qwen3_vl", "text_config": text}
    write_json(source / "config.json", config)
    with pytest.raises(InputError, match="text_config: rope_theta: versions of transformers"):
        opened_model(source)
    wrap(tmp_path / "other", "llama_gqa", "llava", lambda name: f"elsewhere.{name}")
    with pytest.raises(InputError, match="the tensors of the text model are not where"):
        opened_model(tmp_path / "other")


def test_an_output_matrix_that_the_config_ties_is_the_embedding(tmp_path):
    source = wrap(tmp_path / "llava", "llama_gqa", "llava", tie_word_embeddings=True)
    with pytest.raises(InputError, match="ties the output matrix to the embedding, and the two"):
        opened_model(source)
    path = source / WEIGHTS
    tensors = load_file(path)
    embedding = tensors["language_model.model.embed_tokens.weight"]
    save_file({**tensors, "language_model.lm_head.weight": embedding}, path)
    opened_model(source).close()
