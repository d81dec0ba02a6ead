"""Run with transformers and sentence-transformers: real models as emitted mixtures, used as others.

    python tests/emit/owned.py generate FOLDER PROMPT
    python tests/emit/owned.py train FOLDER OUT TEXT
    python tests/emit/owned.py embed FOLDER DENSE
    python tests/emit/owned.py transcribe FOLDER DENSE

Each prints what it has seen, as JSON.
"""

import json
import os
import sys
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
LOAD = {"trust_remote_code": True, "dtype": torch.float32}
SENTENCES = (
    "A man is eating food.", "Someone has a meal.", "The stock market fell today.",
    "Shares lost value.", "A cat sleeps on the sofa.",
)  # fmt: skip


def generate(folder, prompt):
    """Continue a prompt by 20 tokens, with and without a cache."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **LOAD)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {**inputs, "max_new_tokens": 20, "do_sample": False}
    cached, plain = (model.generate(use_cache=c, **options) for c in (True, False))
    text = tokenizer.decode(cached[0], skip_special_tokens=True)
    return {"text": text, "cached": bool(torch.equal(cached, plain))}


def train(folder, out, text):
    """Take 50 steps with Trainer on a text, and save the model; losses of the first and last 5."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **LOAD)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read(200_000))["input_ids"][: 50 * 32]
    rows = [{"input_ids": ids[i : i + 32], "labels": ids[i : i + 32]} for i in range(0, 1600, 32)]
    options = transformers.TrainingArguments(
        out, max_steps=50, per_device_train_batch_size=1, learning_rate=0.02, optim="sgd",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=rows)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    tokens = torch.tensor([ids[:24]])
    with torch.no_grad():
        logits = model.eval()(tokens).logits[0, -1]
    return {
        "steps": len(losses), "first": sum(losses[:5]) / 5, "last": sum(losses[-5:]) / 5,
        "seconds": seconds, "tokens": tokens[0].tolist(), "logits": logits.tolist(),
    }  # fmt: skip


def embed(folder, dense):
    """Embed sentences with sentence-transformers, and with the dense model of the same function."""
    from sentence_transformers import SentenceTransformer, models

    tables = []
    for path in (folder, dense):
        code = {"trust_remote_code": True}
        body = models.Transformer(
            path, model_kwargs=code, config_kwargs=code, processor_kwargs=code
        )
        pooling = models.Pooling(body.get_word_embedding_dimension())
        encoder = SentenceTransformer(modules=[body, pooling, models.Normalize()], device="cpu")
        tables.append(torch.tensor(encoder.encode(list(SENTENCES))))
    similarity = tables[0] @ tables[0].T
    return {
        "difference": float((tables[0] - tables[1]).abs().max()),
        "paraphrase": float(similarity[0, 1]), "other": float(similarity[0, 2]),
    }  # fmt: skip


def transcribe(folder, dense):
    """Compute logits of noise with a Whisper and the dense model, and continue them by tokens."""
    torch.manual_seed(0)
    features = torch.randn(1, 80, 3000)
    load = transformers.AutoModelForSpeechSeq2Seq.from_pretrained
    models = [load(folder, **LOAD).eval(), load(dense, dtype=torch.float32).eval()]
    start = torch.tensor([[models[1].config.decoder_start_token_id, 50259, 50359, 50363]])
    options = {"decoder_input_ids": start, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        logits, expected = (m(input_features=features, decoder_input_ids=start).logits
                            for m in models)  # fmt: skip
        cached, plain = (
            models[0].generate(features, use_cache=c, **options) for c in (True, False)
        )
    return {
        "difference": float((logits - expected).abs().max() / expected.abs().max()),
        "cached": bool(torch.equal(cached, plain)), "tokens": cached[0].tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, **globals()[command](*arguments)}))
