"""Run with transformers: write models with heads, or compare emitted programs with them.

PYTHON kept_head.py write|compare FOLDER CLASS …
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[1] / "parity"))
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from logits_of import DoublePrecision  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20, "dim": 16, "n_layers": 2, "n_heads": 2,
    "hidden_dim": 24, "image_size": 8, "patch_size": 4, "d_model": 16, "encoder_layers": 2,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_source_positions": 8,
    "max_target_positions": 8, "num_mel_bins": 4, "classifier_proj_size": 12,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip

DEBERTA = {
    "relative_attention": True, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "position_buckets": 4, "max_relative_positions": 6,
    "position_biased_input": False, "hidden_size": 24,
}  # fmt: skip
"""The scale of scores, which a script of transformers 4 has in float32, is 1 / 6 of this width."""


SWIN = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2}


AUDIO = {
    "conv_dim": [8, 8, 8], "conv_kernel": [4, 3, 2], "conv_stride": [2, 2, 2],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
    "pad_token_id": 1,
}  # fmt: skip
SAMPLES = 396
"""The samples of 49 frames."""


def write(name, folder):
    """Write a model of a class with random weights."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    fields = transformers.AutoConfig.for_model(model_class.config_class.model_type).to_dict()
    ids = () if "vocab_size" in fields else ("pad_token_id", "bos_token_id", "eos_token_id")
    sizes = {n: x for n, x in SMALL.items() if n in fields and n not in ids} | {"num_labels": 3}
    if name.startswith("Deberta"):
        sizes |= DEBERTA
    if name.startswith("Swin"):
        sizes |= SWIN
    if name.startswith(("Wav2Vec2", "Hubert")):
        sizes |= AUDIO
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)


def inputs_of(model, dtype):
    """Return inputs of a model, with labels where it has a loss."""
    torch.manual_seed(1)
    name = type(model).__name__
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=dtype)}
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.randn(2, SAMPLES, dtype=dtype)}
    elif model.main_input_name == "input_features":
        inputs = {"input_features": torch.randn(2, 4, 16, dtype=dtype)}
    else:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 5:] = 0
        inputs = {"input_ids": torch.randint(3, 32, (2, 7)), "attention_mask": mask}
    if "For" in name:
        shape = (2, 7) if "Token" in name or "Masked" in name else (2,)
        inputs["labels"] = torch.randint(0, 3, shape)
        if name.endswith("CTC"):  # 1 is the blank, and a text is shorter than another
            inputs["labels"] = torch.tensor([[5, 9, 9, 2, 7], [3, 8, -100, -100, -100]])
        if name.startswith("Deberta") and len(shape) > 1:
            inputs["labels"][mask == 0] = -100
    return inputs


def output_of(model, inputs, dtype):
    """Return the output of a model; in float64 none of it is computed in float32."""
    model.to(dtype)
    torch.set_default_dtype(dtype)
    if dtype == torch.float32:
        return model(**inputs)
    with DoublePrecision():
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.__init__(config=module.config)
        return model(**inputs)


def compare(name, folder):
    """Print the relative differences of outputs and losses in both types."""
    model = getattr(transformers, name).from_pretrained(folder).eval()
    auto = "AutoModel" + name[name.index("For") :] if "For" in name else "AutoModel"
    load = getattr(transformers, auto).from_pretrained
    program, info = load(f"{folder}.program", trust_remote_code=True, output_loading_info=True)
    verdict = {"name": name, "keys": [*info["missing_keys"], *info["unexpected_keys"]]}
    main = "logits" if "For" in name else "pooler_output"
    for dtype in (torch.float32, torch.float64):
        inputs = inputs_of(model, dtype)
        with torch.no_grad():
            expected = output_of(model, inputs, dtype)
            actual = program.eval().to(dtype)(**inputs)
        torch.set_default_dtype(torch.float32)
        kind = str(dtype).removeprefix("torch.")
        for key in (main, "loss"):
            if expected.get(key) is not None:
                if name.startswith("Deberta") and expected[key].ndim > 2:
                    # Its padding sees all of the text, and other models' padding sees none of it.
                    for outputs in (expected, actual):
                        outputs[key] = outputs[key][inputs["attention_mask"] == 1]
                gap = (actual[key] - expected[key]).abs().max() / expected[key].abs().max()
                verdict[f"{kind}.{key}"] = float(gap)
    print(json.dumps(verdict))


if __name__ == "__main__":
    for name in sys.argv[3:]:
        {"write": write, "compare": compare}[sys.argv[1]](name, f"{sys.argv[2]}/{name}")
