"""Token folders: texts as token ids, with the beginnings of documents and what made them."""
