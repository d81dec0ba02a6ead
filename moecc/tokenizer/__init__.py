"""A checkpoint's tokenizer, run in a subprocess because its file is untrusted."""
