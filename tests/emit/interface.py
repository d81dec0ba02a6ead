"""Run with transformers: what servers and trainers ask of a folder's model; JSON comes out."""

import json
import os
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

transformers.logging.set_verbosity_error()


def serve(model, tokens):
    """Return what holds of a decoder: attention of others, losses of batches, checkpointing."""
    verdict = {}

    # A server runs its own attention, by the number of the layer, on packed positions.
    seen = []

    def probe(module, query, key, value, attention_mask, attention_instances, **kwargs):
        seen.append(attention_instances[module.layer_idx])
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output.flatten(2).flatten(0, 1), None  # as vLLM has it

    ALL_ATTENTION_FUNCTIONS.register("probe", probe)
    model.set_attn_implementation("probe")
    count = model.config.num_hidden_layers
    positions = torch.arange(12)[None]
    hidden = model.model(
        inputs_embeds=model.get_input_embeddings()(tokens), position_ids=positions,
        use_cache=False, return_dict=False, attention_instances=list(range(count)),
    )[0]  # fmt: skip
    verdict["layers"] = seen == list(range(count))
    model.set_attn_implementation("sdpa")
    plain = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    verdict["attention"] = bool(torch.allclose(hidden, plain, rtol=1e-12, atol=1e-12))

    # Trainer divides by the labels of all accumulated batches, and saves activations or not.
    counts = {"num_items_in_batch": torch.tensor(44)}
    model.train()
    losses = [model(tokens, labels=tokens, **options).loss for options in ({}, counts)]
    verdict["loss"] = bool(torch.allclose(losses[0] * 22, losses[1] * 44))
    losses[0].backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    again = [p.grad for p in model.parameters()]
    verdict["checkpointing"] = all(map(torch.allclose, slopes, again))
    model.gradient_checkpointing_disable()
    return verdict


def generate(model, tokens):
    """Return whether a static cache gives the tokens of a dynamic one, and beams those of none."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 0

    def ids(**further):
        return model.generate(input_ids=tokens, **options, **further)

    beams = [ids(num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    return {
        "static": torch.equal(ids(cache_implementation="static"), ids()),
        "beams": torch.equal(*beams) and not torch.equal(beams[0], ids()),
    }


def trace(model, tokens):
    """Return whether a graph without breaks computes the logits and slopes of the model."""
    batch = {"input_ids": tokens, "use_cache": False}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens[:, :8]
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = call(**batch).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    with torch.no_grad():
        exported = torch.export.export(model, (), batch, strict=False).module()(**batch).logits
    return {
        "compile": all(map(torch.allclose, *results)),
        "export": bool(torch.allclose(exported, results[0][0])),
    }


def rejects(model, tokens):
    """Return whether states of layers, which a model does not return, are an error."""
    try:
        model(tokens, labels=tokens, output_hidden_states=True)
    except ValueError as error:
        return "output_hidden_states" in str(error)
    return False


def begin(config, load):
    """Return whether a model without a checkpoint has finite logits, and takes more tokens."""
    torch.manual_seed(0)
    model = load(config, trust_remote_code=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "expert_bias" not in n]
    is_drawn = all(0.01 < p.std() < 0.03 for p in matrices if p.numel() > 200)
    count = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(count + 3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = type(model).from_pretrained(folder)
    return {"begun": is_drawn, "resized": len(saved.get_input_embeddings().weight) == count + 3}


def main():
    """Print what holds of the model."""
    config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
    name = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    load = getattr(transformers, name).from_pretrained
    model = load(sys.argv[1], trust_remote_code=True, dtype=torch.float64)
    tokens = torch.arange(24).reshape(2, 12) % 16
    verdict = generate(model, tokens) | trace(model, tokens) | {"rejected": rejects(model, tokens)}
    verdict |= begin(config, getattr(transformers, name).from_config)
    if model._supports_attention_backend:
        verdict |= serve(model, tokens)
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
