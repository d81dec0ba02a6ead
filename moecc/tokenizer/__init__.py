"""A checkpoint's tokenizer, run in a process of its own: it is a file that nobody vouches for."""
