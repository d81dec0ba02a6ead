"""Judge emitted folders with torch and transformers alone.

A line in has a folder and the file of its reference; a line out is JSON.
"""

import json
import os
import sys
import traceback
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

NAMES = {
    "tokens": "input_ids",
    "decoder_tokens": "decoder_input_ids",
    "mask": "attention_mask",
    "pixels": "pixel_values",
    "features": "input_features",
    "audio": "input_values",
}


def judge(folder, reference):
    """Return the relative errors of outputs, losses and gradients, and whether caches agree."""
    reference = dict(np.load(reference))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    # The heads of an encoder are new: what it computes is its hidden states.
    autos = [n for n in config.auto_map if n.startswith("AutoModelFor") and "Classif" not in n]
    loader = getattr(transformers, autos[0] if autos else "AutoModel")
    graph = " ".join(line for line in config.graph[:12])
    is_train = 'attr mode = "train"' in graph
    verdict = {}
    model, info = loader.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        model.train(is_train)
        inputs = {
            NAMES[n.removeprefix("in.")]: tensor_of(reference[n], dtype)
            for n in reference
            if n.startswith("in.")
        }
        output = model(**inputs)
        main = "out.logits" if "out.logits" in reference else "out.hidden"
        values = output["logits" if main == "out.logits" else "last_hidden_state"]
        scores, expected = values.detach().double().numpy(), reference[main]
        if main == "out.hidden" and "in.mask" in reference:
            scores, expected = (x * reference["in.mask"][..., None] for x in (scores, expected))
        kind = str(dtype).removeprefix("torch.")
        verdict[f"{kind}.output"] = relative(scores, expected)
        loss = (values * tensor_of(reference["cotangent"], dtype)).sum()
        if "out.loss.auxiliary" in reference:
            aux = output["aux_loss"]
            wanted = reference["out.loss.auxiliary"]
            verdict[f"{kind}.aux_loss"] = relative(aux.detach().double().numpy(), wanted)
            loss = loss + aux
        if any(n.startswith("grad.") for n in reference):
            loss.backward()
            verdict[f"{kind}.gradient"] = max(
                gradient_error(p, reference[f"grad.{n}"]) for n, p in model.named_parameters()
            )
            model.zero_grad()
    # What a capacity drops depends on all tokens, and a continued text has none.
    is_bounded = any("slots=capacity" in line for line in config.graph)
    # Turns at an expert (switch) are counted over all tokens: there is no cache.
    # A short convolution, whose shifts are windows of one token, has none, and takes no padding;
    # nor has attention in chunks.
    causal = [line for line in config.graph if "= causal" in line]
    takes_padding = not any("window=1}" in line or "%in_chunk" in line for line in causal)
    has_cache = takes_padding and not any(".ffn" in line for line in causal)
    expected = reference.get("generated")
    modes = [True] * has_cache + [False] * (not is_bounded)
    if model.can_generate() and modes:
        verdict |= generation(model.eval(), inputs, expected, modes, takes_padding)
    return verdict


def tensor_of(array, dtype):
    """Return an array as a tensor: integers as indices, numbers in the type of the model."""
    tensor = torch.tensor(array)
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.dtype == torch.bool else tensor.long()


def relative(x, expected):
    """Return the largest difference over the largest magnitude."""
    return float(np.abs(x - expected).max() / max(np.abs(expected).max(), 1e-30))


def gradient_error(parameter, expected):
    """Return the relative error of a gradient; one that is zero everywhere is compared to 1."""
    slope = parameter.grad
    slope = np.zeros(expected.shape) if slope is None else slope.double().numpy()
    scale = np.abs(expected).max()
    return float(np.abs(slope - expected).max() / (scale if scale > 1e-12 else 1.0))


def generation(model, inputs, expected, modes, takes_padding):
    """Return whether generation with and without a cache, and left padding, gives equal tokens.

    Args:
      model: of float64, in evaluation.
      inputs: those of the model.
      expected: the tokens of moecc generate, ``[batch, token]``; None: there are none.
      modes: whether keys and values are cached, for each way of generating that there is.
      takes_padding: whether texts may be of several lengths.
    """
    count = 6
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts, names = [inputs], ["plain"]
    if "decoder_input_ids" in inputs:
        prompts = [{n: x for n, x in inputs.items() if n != "decoder_input_ids"}]
        options["decoder_start_token_id"] = 0
    else:
        ids = inputs["input_ids"][:, :6]
        prompts = [{"input_ids": ids}]
        if takes_padding:
            prompts += map(left_padded, (ids, ragged(ids)))
            names += ["padded", "ragged"]

    def continued(prompt, cached):
        return model.generate(**prompt, use_cache=cached, **options)[:, -count:].numpy()

    tokens = {
        (name, cached): continued(prompt, cached)
        for name, prompt in zip(names, prompts, strict=True)
        for cached in modes
    }
    if not takes_padding:
        texts = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :4]}]
        names.append("ragged")
        for cached in modes:
            tokens["ragged", cached] = np.concatenate([continued(t, cached) for t in texts])
    first = tokens["plain", modes[0]]
    verdict = {}
    for cached in modes:
        equal = (tokens[name, cached] == first for name in names if name != "ragged")
        verdict["cached" if cached else "uncached"] = all(bool(x.all()) for x in equal)
    if expected is not None:
        results = [tokens[names[-1], cached] for cached in modes]
        verdict["moecc"] = all(bool((x == expected).all()) for x in results)
    return verdict


def ragged(ids):
    """Return prompts of 6 and 4 tokens, 0 before the shorter one."""
    return torch.stack([ids[0], torch.cat([torch.zeros_like(ids[1, :2]), ids[1, :4]])])


def left_padded(ids):
    """Return prompts with three more zeros before them, and the mask of what they are."""
    ids = torch.cat([torch.zeros(len(ids), 3, dtype=torch.long), ids], dim=1)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def main():
    """Judge the folders on standard input."""
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))
    for line in sys.stdin:
        try:
            verdict = judge(*line.rstrip("\n").split("\t"))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            verdict = {"error": f"{type(error).__name__} at {where}: {error}"[:400]}
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
