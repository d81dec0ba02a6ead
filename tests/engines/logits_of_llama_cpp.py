"""What llama.cpp computes of GGUF files: run by an interpreter that has llama-cpp-py-sync.

Reads a JSON list of {"file": …, "tokens": …} from standard input, where tokens is a ``.npy`` of ids
[sequences, length]; writes the logits beside each file as ``FILE.logits.npy``, in float32.  With
{"file": …, "prompt": …, "count": n} it continues a text greedily.  What each job gave, or why the
engine refused it, goes to standard output as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from llama_cpp_py_sync import _cffi_bindings as bindings

FFI, LIB = bindings.get_ffi(), bindings.get_lib()
LOG: list[str] = []


@FFI.callback("void(enum ggml_log_level, const char *, void *)")
def _log(level: int, text, data):
    if level >= 3:  # warnings and errors
        LOG.append(FFI.string(text).decode("utf-8", "replace").strip())


class Engine:
    """One model, computed in float32 by one thread: cache in float32, no flash attention."""

    def __init__(self, file: str, context: int):
        params = LIB.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = LIB.llama_model_load_from_file(file.encode(), params)
        if self.model == FFI.NULL:
            raise RuntimeError(" | ".join(line for line in LOG if line)[-600:])
        options = LIB.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0
        options.flash_attn_type = 0
        self.context = LIB.llama_init_from_model(self.model, options)
        if self.context == FFI.NULL:
            raise RuntimeError(" | ".join(LOG)[-600:])
        self.vocab = LIB.llama_model_get_vocab(self.model)
        self.width = LIB.llama_vocab_n_tokens(self.vocab)

    def logits(self, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the logits [length, vocab] of one sequence."""
        LIB.llama_memory_clear(LIB.llama_get_memory(self.context), True)
        batch = LIB.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if LIB.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [LIB.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        size = 4 * self.width
        made = [np.frombuffer(FFI.buffer(row, size), np.float32).copy() for row in rows]
        LIB.llama_batch_free(batch)
        return np.stack(made)

    def tokens(self, text: str) -> list[int]:
        raw = text.encode()
        found = FFI.new("llama_token[]", len(raw) + 8)
        count = LIB.llama_tokenize(self.vocab, raw, len(raw), found, len(raw) + 8, True, True)
        return list(found[0:count])

    def close(self):
        LIB.llama_free(self.context)
        LIB.llama_model_free(self.model)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    LOG.clear()
    try:
        if "prompt" in job:
            return _continued(job)
        tokens = np.load(job["tokens"])
        engine = Engine(job["file"], max(32, tokens.shape[1]))
        made = np.stack([engine.logits([int(t) for t in line]) for line in tokens])
        engine.close()
    except RuntimeError as error:
        return {"refused": str(error)}
    np.save(job["file"] + ".logits.npy", made)
    return {}


def _continued(job: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(job["file"], 128)
    ids = engine.tokens(job["prompt"])
    prompt = len(ids)
    for _ in range(job["count"]):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    engine.close()
    return {"prompt": ids[:prompt], "added": ids[prompt:]}


def main():
    LIB.llama_log_set(_log, FFI.NULL)
    LIB.llama_backend_init()
    print(json.dumps({"reports": [answer(job) for job in json.load(sys.stdin)]}))


if __name__ == "__main__":
    main()
