"""GGUF files: a bounded header reader, tensors by rows, config and tokenizer, and a writer."""

from __future__ import annotations
