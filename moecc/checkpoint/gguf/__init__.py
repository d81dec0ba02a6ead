"""GGUF files: a bounded header reader, tensors by rows, config and tokenizer from metadata."""

from moecc.checkpoint.gguf.reader import GgufFile as GgufFile
from moecc.checkpoint.gguf.reader import open_gguf as open_gguf
